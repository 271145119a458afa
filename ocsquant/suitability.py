"""Which layers have an integer kernel for a recipe, and which of them gain from it."""

from __future__ import annotations

from torch import Tensor, nn

from ocsquant.config import Activations, Recipe
from ocsquant.layers import CONVOLUTIONS
from ocsquant.nn import form_of
from ocsquant.nn.recurrent import part_names, part_sizes, recurrent_form
from ocsquant.ops import cpu_isa

# Channels in and out of a convolution whose kernel is one element, for inputs that lie channels last, and first.
POINTWISE_LAST, POINTWISE_FIRST = (256, 64), (512, 256)
# Channels in and out of a group, any kernel, on a CPU whose integer products are that much faster; and weights of an
# output, with so many outputs, where there are fewer (the first convolution of a network).
SMALLEST_VNNI, DEPTH_VNNI, WIDE_VNNI = 32, 128, 64
SMALLEST_HIDDEN = 32  # of an LSTM or GRU (benchmarks/recurrent.py)
SMALLEST_OUT, SMALLEST_IN, NARROW_IN, WIDE_OUT = 64, 64, 128, 128
SMALLEST_CHANNELS = (64, 96)  # in and out of a convolution without VNNI whose kernel is larger
SMALLEST_STORED = 4096  # weights that are worth storing in fewer bits
GROUP_STEP = 16  # groups end where the kernels' 16-bit sums do
MAX_DEPTH = 131072  # columns of an exact int32 sum, csrc/core/kernels.h


def pays(out_features: int, in_features: int) -> bool:
    """Whether the integer linear is at least as fast as the float one, for few tokens and for many.

    Measured (benchmarks/small_layers.py): quantizing a token costs time that short rows or few outputs do not win back.
    """
    wide_enough = SMALLEST_OUT if in_features >= NARROW_IN else WIDE_OUT
    return in_features >= SMALLEST_IN and out_features >= wide_enough


def convolution_pays(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """The same for a convolution (benchmarks/convolution.py): turning pixels into rows of channels must be won back."""
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    if cpu_isa()[0] not in ("avx2", "scalar"):
        deep = module.weight[0].numel() >= DEPTH_VNNI and outputs >= WIDE_VNNI
        return deep or min(inputs, outputs) >= SMALLEST_VNNI
    if module.kernel_size.count(1) == len(module.kernel_size):
        last = module.weight.dim() > 3 and module.weight.stride(-1) == inputs > 1  # so is its input, then
        smallest_in, smallest_out = POINTWISE_LAST if last else POINTWISE_FIRST
        return inputs >= smallest_in and outputs >= smallest_out
    smallest_in, smallest_out = SMALLEST_CHANNELS
    return inputs >= smallest_in and outputs >= smallest_out


def kernel_problem(module: nn.Module, kind: str, recipe: Recipe, named: bool) -> str | None:
    """Why there is no integer kernel for this layer, or why it would not pay."""
    if recipe.activations is None or kind == "embedding":
        return _storage_problem(module, recipe, named)
    if recipe.activations.needs_calibration and (problem := fixed_inputs_problem(module, recipe.activations)):
        return problem
    if isinstance(module, nn.Linear):
        depths, gains = [module.in_features], pays(module.out_features, module.in_features)
        size = f"{module.out_features} outputs of {module.in_features} inputs"
    elif isinstance(module, CONVOLUTIONS):
        depths, gains = [module.weight[0].numel()], convolution_pays(module)
        outputs, channels = module.out_channels // module.groups, module.in_channels // module.groups
        size = f"{outputs} outputs of {channels} channels" + (" in each group" if module.groups > 1 else "")
        grouped = recipe.weights.granularity == "group" and recipe.weights.group_size < depths[0]
        if grouped and module.groups > 1:
            return "no integer kernel for group scales in grouped convolutions yet: use simulate=True for its accuracy"
    else:
        assert isinstance(module, nn.RNNBase)
        gates = recurrent_form(module).gates
        depths = [part_sizes(module, name, gates)[1] for name in part_names(module)]
        gains, size = module.hidden_size >= SMALLEST_HIDDEN, f"{module.hidden_size} hidden units"
    problem = next((problem for inputs in depths if (problem := _product_problem(inputs, recipe))), None)
    return problem or (None if named or gains else f"too small to gain: {size}")


def fixed_inputs_problem(module: nn.Module, activations: Activations) -> str | None:
    """Why the integer kernel of this layer cannot have these inputs, whose scales calibration gives."""
    if isinstance(module, nn.Linear):
        return None
    missing = "calibrated inputs" if not isinstance(module, CONVOLUTIONS) else None
    missing = missing or ("inputs scaled and then quantized per token" if activations.scale == "token" else None)
    missing = missing or (None if activations.symmetric else "zero points of inputs")
    if missing is None and activations.split is not None and module.groups != 1:
        missing = "split input channels in groups"
    name = type(module).__name__
    return None if missing is None else f"no integer kernel for {name} with {missing}: use PerToken activations"


def _product_problem(inputs: int, recipe: Recipe) -> str | None:
    weights, activations = recipe.weights, recipe.activations
    assert activations is not None
    if not weights.symmetric and weights.bits == 8:
        return "no integer kernel for zero points at 8 bits: use simulate=True for its accuracy"
    if weights.granularity == "group" and weights.group_size < inputs:
        missing = "calibrated inputs" if activations.needs_calibration else None
        missing = "split channels" if weights.ocs is not None else missing
        missing = f"{weights.group_size} (no multiple of 16)" if weights.group_size % GROUP_STEP else missing
        if missing is not None:
            return f"no integer kernel for groups of {missing} yet: use simulate=True for its accuracy"
    depth = MAX_DEPTH if activations.scale == "token" else MAX_DEPTH // 2
    if 2 * inputs > depth:  # every channel may get a tail column
        return f"more than {depth // 2} inputs: int32 sums would not be exact"
    return None


def _storage_problem(module: nn.Module, recipe: Recipe, named: bool) -> str | None:
    """Why the weight of this layer cannot be stored in fewer bits, or why that would save nothing worth it."""
    if form_of(module) is None:
        return f"no weight-only form for {type(module).__name__} yet: use simulate=True for its accuracy"
    if getattr(module, "max_norm", None) is not None:
        return "its max_norm changes the weight as it runs"
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not named and weight.numel() < SMALLEST_STORED:
        return f"too small to gain: {weight.numel()} weights"
    return None


def split_problem(module: nn.Module, kind: str) -> str | None:
    """Why a layer's channels cannot be copied for real."""
    if kind == "linear":
        return None
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return None if module.groups == 1 else "a grouped convolution has no structural copies, only a wider code range"
    return f"{type(module).__name__} has no structural copies, only a wider code range"


def shares_rows(recipe: Recipe) -> bool:
    """Whether a linear layer and the embedding it is tied to get one record of their weight (nn.TiedEmbedding)."""
    w, activations = recipe.weights, recipe.activations
    plain = w.symmetric and w.granularity != "group" and w.split is None and w.codebook is None
    return w.bits == 8 and plain and (activations is None or not activations.needs_calibration)
