"""An embedding that looks its rows up in the weight of the linear layer it is tied to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocsquant.errors import ArgumentError
from ocsquant.layout import PANEL
from ocsquant.nn.linear import QuantizedLinear
from ocsquant.nn.quantized import Quantized

OFFSET = 128  # of a packed byte, csrc/core/kernels.h


class TiedEmbedding(Quantized):
    """nn.Embedding over `packed` and `scale` of a `QuantizedLinear` of 8 bits: one record, as the float model has.

    Rows come in the dtype the float weight would have.
    """

    origin = "Embedding"
    kernel = "rows of the head it is tied to"
    bits = 8
    tensors = ("packed", "scale")
    packed: Tensor
    scale: Tensor
    output_like: Tensor

    def __init__(self, like: Any, head: QuantizedLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.padding_idx: int | None = like.padding_idx
        self.register_buffer("packed", head.packed)
        self.register_buffer("scale", head.scale)
        dtype: Any = like.output_like.dtype if isinstance(like, Quantized) else like.weight.dtype
        self.register_buffer("output_like", torch.empty(0, dtype=dtype), persistent=False)

    @staticmethod
    def fits(head: QuantizedLinear) -> bool:
        """Whether rows can be looked up in this layer's weight."""
        return head.weight_bits == 8 and head.group_size == 0 and head.tail_index is None and head.input_inverse is None

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.int32, torch.int64):
            raise ArgumentError("input", "int32 or int64", input.dtype)
        ids = input.reshape(-1).long()
        blocks = -(-self.embedding_dim // 4)
        scale = self.scale.index_select(0, ids)  # which takes no negative ones, as an embedding
        rows = self.packed[ids // PANEL, :blocks, ids % PANEL].flatten(1)[:, : self.embedding_dim]
        values = (rows.float() - OFFSET) * scale[:, None]
        return values.to(self.output_like.dtype).reshape(*input.shape, self.embedding_dim)

    @property
    def weight(self) -> Tensor:
        """float32 [num_embeddings, embedding_dim], dequantized anew at each reading."""
        return self.forward(torch.arange(self.num_embeddings, device=self.packed.device)).float()

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.num_embeddings, self.embedding_dim))

    @property
    def split_channels(self) -> int:
        return 0

    def settings(self) -> dict[str, Any]:
        return {"kind": "TiedEmbedding", "shape": list(self.weight_shape)}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8"
