"""Every operator in plain Python and PyTorch, written for reading: the oracle of all kernels."""

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor


def fp32(value: float) -> float:
    """A Python float rounded to float32."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def quantize_token(x: Tensor, bits: int = 8, max_outliers: int = 16, threshold: float = 4.0) -> tuple[list[int], float]:
    """Codes and step of one float32 token: run-time OCS, one scalar operation at a time."""
    values = x.tolist()
    limit = 2 ** (bits - 1) - 1
    if any(not math.isfinite(v) for v in values):
        return [0] * len(values), math.nan
    absmax = max((abs(v) for v in values), default=0.0)
    step = fp32(absmax / limit)
    if max_outliers > 0 and values:
        lanes = [0.0] * 64
        for k in range(-(-len(values) // 64) * 64):
            v = values[k] if k < len(values) else 0.0
            lanes[k % 64] = fp32(lanes[k % 64] + fp32(v * v))
        width = 32
        while width:
            lanes = [fp32(lanes[i] + lanes[i + width]) for i in range(width)]
            width //= 2
        if 2.0**-100 <= lanes[0] < math.inf:
            rms = fp32(math.sqrt(fp32(lanes[0] / fp32(len(values)))))
            step = fp32(min(absmax, fp32(fp32(threshold) * rms)) / limit)
    codes = _codes(values, step)
    if max_outliers > 0 and sum(abs(c) > limit for c in codes) > max_outliers:
        step = fp32(sorted(map(abs, values), reverse=True)[max_outliers] / limit)
        codes = _codes(values, step)
    return codes, step if step >= 2.0**-120 else 0.0


def quantize_plane(x: Tensor, bits: int = 8, max_outliers: int = 16, threshold: float = 4.0) -> tuple[Tensor, float]:
    """Codes int64 and step of one sample [channels, height, width], its values in the order of memory."""
    values = (x if x.is_contiguous() else x.permute(1, 2, 0)).flatten()
    limit, absmax = 2 ** (bits - 1) - 1, float(x.abs().max())
    _, step = quantize_token(values, bits, values.numel() if max_outliers else 0, threshold)
    if not math.isfinite(step):
        return torch.zeros(x.shape, dtype=torch.int64), step
    step = max(step, fp32(absmax / 32512.0)) if max_outliers else step

    def codes(step: float) -> Tensor:
        flat = torch.tensor(_codes(x.flatten().tolist(), step), dtype=torch.int64)
        return flat.reshape(x.shape)

    made = codes(step)
    if max_outliers and int((made.abs() > limit).sum()) > max_outliers * x[0].numel():
        step = fp32(absmax / limit)
        made = codes(step)
    return made, step


def quantize_plane_fixed(
    x: Tensor, inverse: Tensor, shift: Tensor | None, depth: int, bits: int, max_outliers: int
) -> tuple[Tensor, float]:
    """The same for the step 1 of (x - shift) * inverse, of a weight without tail."""
    u = (x if shift is None else x - shift[:, None, None]) * inverse[:, None, None]
    if not bool(u.isfinite().all()):
        return torch.zeros(x.shape, dtype=torch.int64), math.nan
    limit = 2 ** (bits - 1) - 1
    most = max(limit, min(32512, int(1 / (depth * (127.0 / 2147483648.0 * 1.02)))))
    made = u.clamp(-most, most).round().long()
    if int((made.abs() > limit).sum()) > max_outliers * x[0].numel():
        made = made.clamp(-limit, limit)
    return made, 1.0


def quantized_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    bits: int = 8,
    max_outliers: int = 16,
    threshold: float = 4.0,
    groups: int = 1,
    inverse: Tensor | None = None,
    shift: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """x [samples, channels, height, width], codes int8 [n, channels / groups, kernel_h, kernel_w]; sums exact.

    group_size: columns [kernel_h * kernel_w * channels] in this order that share one of scale [column groups, n].
    """
    if groups > 1:
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory = torch.channels_last if last else torch.contiguous_format
        parts = zip(x.chunk(groups, 1), codes.chunk(groups), scale.chunk(groups), strict=True)
        offsets = [None] * groups if bias is None else bias.chunk(groups)
        fixed = [[None] * groups if v is None else v.chunk(groups) for v in (inverse, shift)]
        alike = (stride, padding, dilation, bits, max_outliers, threshold, 1)
        return torch.cat(
            [
                quantized_conv2d(part.contiguous(memory_format=memory), w, s, offset, *alike, *scales)
                for (part, w, s), offset, *scales in zip(parts, offsets, *fixed, strict=True)
            ],
            1,
        )
    if codes[0, 0].numel() == 1 and padding == (0, 0):
        pixels = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
        if inverse is not None:
            y = scale_folded_linear(
                pixels, codes[:, :, 0, 0], scale, inverse, shift, bias, bits, False, max_outliers, threshold
            )
        else:
            w = codes[:, :, 0, 0]
            y = quantized_linear(pixels, w, scale, bias, None, None, bits, max_outliers, threshold, group_size)
        return y.permute(0, 3, 1, 2)
    rows = []
    for sample in x:
        if inverse is not None:
            q, step = quantize_plane_fixed(sample, inverse, shift, codes[0].numel(), bits, max_outliers)
        else:
            q, step = quantize_plane(sample, bits, max_outliers, threshold)
        total = torch.nn.functional.conv2d(q.double()[None], codes.double(), None, stride, padding, dilation)[0]
        if group_size:
            patches = torch.nn.functional.unfold(q.double()[None], codes.shape[2:], dilation, padding, stride)[0]
            columns = patches.long().unflatten(0, (q.shape[0], -1)).transpose(0, 1).flatten(0, 1).T
            w = codes.permute(0, 2, 3, 1).flatten(1)
            totals = [_groups(w, row, step, scale, group_size) for row in columns]
            rows.append(torch.stack(totals, 1).unflatten(1, total.shape[1:]))
            continue
        rows.append(total.float() * (torch.tensor(step, dtype=torch.float32) * scale)[:, None, None])
    y = torch.stack(rows)
    return y if bias is None else y + bias[:, None, None]


def _codes(values: list[float], step: float) -> list[int]:
    if step < 2.0**-120:
        return [0] * len(values)
    inverse = fp32(1.0 / step)
    return [round(fp32(v * inverse)) for v in values]  # Python rounds ties to even


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    tail_index: Tensor | None = None,
    bits: int = 8,
    max_outliers: int = 16,
    threshold: float = 4.0,
    group_size: int = 0,
) -> Tensor:
    """y = float(sum of integer products) * (step * scale) + bias; with scale [groups, n], a sum for each group."""
    flat = x.reshape(-1, x.shape[-1]).float()
    rows = []
    for token in flat:
        q, step = quantize_token(token, bits, max_outliers, threshold)
        integers = torch.tensor(q, dtype=torch.int64)
        if group_size:
            rows.append(_groups(codes, integers, step, scale, group_size))
            continue
        total = codes.long() @ integers
        if tail is not None:
            total = total + tail.long() @ integers[tail_index.long()]
        rows.append(total.float() * (torch.tensor(step, dtype=torch.float32) * scale))
    y = torch.stack(rows) if rows else torch.empty(0, scale.shape[-1])
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], scale.shape[-1]).to(x.dtype)


def _groups(codes: Tensor, integers: Tensor, step: float, scale: Tensor, size: int) -> Tensor:
    """One token's outputs, the groups' shares added in float32 in ascending order."""
    total = None
    for g in range(scale.shape[0]):
        part = codes[:, g * size : (g + 1) * size].long() @ integers[g * size : (g + 1) * size]
        share = part.float() * (torch.tensor(step, dtype=torch.float32) * scale[g])
        total = share if total is None else total + share
    return total


def fake_quantize_split(x: Tensor, scale: Tensor, splits: Tensor, bits: int) -> Tensor:
    limit = (splits.float() * (2 ** (bits - 1) - 1)).reshape(1, -1, *[1] * (x.dim() - 2))
    s = scale.reshape(-1, *[1] * (x.dim() - 1))
    q = torch.round(x.float() * (1.0 / s))
    clamped = torch.where(q > limit, limit, torch.where(q < -limit, -limit, q))
    return (clamped * s).to(x.dtype)


def fake_quantize_split_backward(
    grad: Tensor, x: Tensor, scale: Tensor, splits: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Straight-through gradients; the scale's summed in float64."""
    limit = (splits.float() * (2 ** (bits - 1) - 1)).reshape(1, -1, *[1] * (x.dim() - 2)).expand_as(x)
    s = scale.reshape(-1, *[1] * (x.dim() - 1))
    u = x.float() * (1.0 / s)
    q = torch.round(u)
    beyond = q.abs() > limit
    slope = torch.where(beyond, limit * q.sign(), q - u)
    terms = (grad.float() * slope).double().flatten(1).sum(1)
    dscale = terms.sum() if scale.dim() == 0 else terms
    return torch.where(beyond, torch.zeros_like(grad), grad), dscale.float()


def fake_quantize_clip(x: Tensor, low: Tensor, high: Tensor, bits: int, align_zero: bool = False) -> Tensor:
    """In the precision of the clips: float32 gives the bits of the kernels."""
    n, low, high = 2**bits - 1, low.reshape(()), high.reshape(())
    least = torch.maximum(1e-6 * torch.maximum(low.abs(), high.abs()), torch.full_like(low, 1e-12))
    high = torch.where(high - low < least, low + least, high)
    width = high - low
    step, inverse = width / n, n / width
    if align_zero:
        low = torch.round(low * inverse) * step
        high = low + width
    place = (torch.minimum(torch.maximum(x.to(low.dtype), low), high) - low) * inverse
    return (torch.round(place).clamp(max=n) * step + low).to(x.dtype)


def fake_quantize_clip_backward(
    grad: Tensor, x: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dlow, dhigh by the closed form, in the precision of the clips."""
    n = 2**bits - 1
    x, grad = x.to(low.dtype), grad.to(low.dtype)
    place = (x - low) * (n / (high - low))
    inside = (x > low) & (x < high)
    error = torch.where(inside, (place - torch.round(place)) / n * grad, torch.zeros_like(grad)).sum()
    dlow, dhigh = grad[x <= low].sum() + error, grad[x >= high].sum() - error
    return torch.where(inside, grad, torch.zeros_like(grad)), dlow, dhigh


def kurtosis(y: Tensor) -> Tensor:
    """m4 / m2^2 of each row."""
    z = y - y.mean(-1, keepdim=True)
    m2 = z.square().mean(-1)
    flat = (m2 <= 1e-10 * y.square().mean(-1)) | (m2 < 2.0**-100)
    k = z.pow(4).mean(-1) / torch.where(flat, torch.ones_like(m2), m2).square()
    return torch.where(flat, torch.zeros_like(k), k)


def kurtosis_gradient(y: Tensor) -> Tensor:
    """dK/dy_i = 4 / (d m2^2) (z_i^3 - m3 - K m2 z_i)."""
    z = y - y.mean(-1, keepdim=True)
    m2, m3 = z.square().mean(-1, keepdim=True), z.pow(3).mean(-1, keepdim=True)
    k = kurtosis(y)[..., None]
    gradient = 4 / (y.shape[-1] * m2.square()) * (z.pow(3) - m3 - k * m2 * z)
    return torch.where(k == 0, torch.zeros_like(gradient), gradient)


def lstm_step(x: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Output and cell state in float64, from what the input and the last output add to the gates [batch, 4 hidden]."""
    i, f, g, o = (x.double() + r.double()).chunk(4, 1)
    c = f.sigmoid() * c.double() + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(x: Tensor, r: Tensor, h: Tensor) -> Tensor:
    """The next output in float64; gates [batch, 3 hidden]."""
    (xr, xz, xn), (rr, rz, rn) = x.double().chunk(3, 1), r.double().chunk(3, 1)
    fresh = (xn + (xr + rr).sigmoid() * rn).tanh()
    return fresh + (xz + rz).sigmoid() * (h.double() - fresh)


def scale_folded_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    inverse: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
    dynamic: bool = False,
    max_outliers: int = 0,
    threshold: float = 4.0,
) -> Tensor:
    """quantized_linear of (x - shift) * inverse, or with codes that are those numbers, rounded and clamped."""
    flat = x.reshape(-1, x.shape[-1]).float()
    u = (flat if shift is None else flat - shift) * inverse
    if dynamic:
        y = quantized_linear(u, codes, scale, bias, None, None, bits, max_outliers, threshold)
        return y.reshape(*x.shape[:-1], scale.numel()).to(x.dtype)
    limit = 2 ** (bits - 1) - 1
    rows = []
    for token in u:
        values = [round(max(-32512.0, min(32512.0, v))) for v in token.tolist()]
        if sum(abs(v) > limit for v in values) > max_outliers:
            values = [max(-limit, min(limit, v)) for v in values]
        rows.append((codes.long() @ torch.tensor(values)).float() * scale)
    y = torch.stack(rows)
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], scale.numel()).to(x.dtype)


def gptq(
    w: Tensor, hessian: Tensor, codes_of: Callable[[Tensor, int], Tensor], values_of: Callable[[Tensor, int], Tensor]
):
    """Codes float64 [n, k] as optimal brain surgeon gives them, one column after the other, H inverted anew each time.

    codes_of(values [n], column) and values_of(codes [n], column) are the grid. The rounding error of column q moves the
    columns F that are left by -(error) * (H_F^-1)_qF / (H_F^-1)_qq.
    """
    rest = w.double().clone()
    codes = torch.zeros_like(rest)
    left = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        column = left[0]
        inverse = torch.linalg.inv(hessian.double()[left][:, left])
        codes[:, column] = codes_of(rest[:, column], column)
        error = rest[:, column] - values_of(codes[:, column], column)
        rest[:, left] -= error[:, None] * (inverse[0] / inverse[0, 0])
        left = left[1:]
    return codes


def squant(errors: list[list[float]]) -> list[list[int]]:
    """What to subtract from the codes of one output: errors (code less place, in steps) of [channels][positions]."""
    sign = lambda v: (v > 0) - (v < 0)  # noqa: E731
    moves = [[0] * len(kernel) for kernel in errors]
    if len(errors[0]) > 1:
        for kernel, moved in zip(errors, moves, strict=True):
            total = sum(kernel)
            order = sorted(range(len(kernel)), key=lambda i: -sign(total) * kernel[i])
            for i in order[: round(abs(total))]:
                moved[i] = sign(total)
    sums = [sum(kernel) - sum(moved) for kernel, moved in zip(errors, moves, strict=True)]
    total = sum(sums)
    free = []
    for c, (kernel, moved) in enumerate(zip(errors, moves, strict=True)):
        left = [(error - move) * sign(total) for error, move in zip(kernel, moved, strict=True)]
        if max(left) > 0:
            free.append((-sign(total) * sums[c], c, left.index(max(left))))
    for _, c, i in sorted(free)[: round(abs(total))]:
        moves[c][i] += sign(total)
    return moves


def kmeans_step(values: list[float], centres: list[float]) -> list[float]:
    """One step of Lloyd: the mean of the values nearest to each centre."""
    held: list[list[float]] = [[] for _ in centres]
    for v in values:
        held[min(range(len(centres)), key=lambda i: abs(v - centres[i]))].append(v)
    return [sum(h) / len(h) if h else c for h, c in zip(held, centres, strict=True)]


def split_error(values: list[float], cuts: tuple[int, int], levels: int) -> float:
    """Squared error of sorted values in three parts, each rounded to evenly spaced levels over its range."""
    total = 0.0
    for part in (values[: cuts[0]], values[cuts[0] : cuts[1]], values[cuts[1] :]):
        if part:
            grid = [part[0] + (part[-1] - part[0]) * i / (levels - 1) for i in range(levels)]
            total += sum(min((v - g) ** 2 for g in grid) for v in part)
    return total


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, ceil(k / 8) * bits]: each row one long number, the first code in its lowest bits."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append(list(number.to_bytes(-(-len(row) // 8) * bits, "little")))
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), -(-codes.shape[1] // 8) * bits)


def dequantize_weight(
    codes: Tensor, scale: Tensor, bits: int, group_size: int, zero: Tensor | None = None, levels: Tensor | None = None
) -> Tensor:
    """float32 [n, k], one weight at a time."""
    y = torch.empty(codes.shape)
    for i, j in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        group, code = j // group_size, int(codes[i, j])
        if levels is not None:
            number = float(levels[i if levels.shape[0] > 1 else 0, code])
        else:
            number = code - (2 ** (bits - 1) if zero is None else float(zero[i, group]))
        y[i, j] = fp32(number * float(scale[i, group]))
    return y


NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0.0),
    "gelu": lambda x: x * torch.special.erfc(-x / math.sqrt(2.0)) / 2.0,
    "gelu_tanh": lambda x: x / 2.0 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1.0 + torch.exp(-x)),
    "sigmoid": lambda x: 1.0 / (1.0 + torch.exp(-x)),
    "tanh": torch.tanh,
}


def nonlinear(x: Tensor, nonlinearity: str) -> Tensor:
    """In float64."""
    return x.double() if nonlinearity == "none" else NONLINEARITIES[nonlinearity](x.double())
