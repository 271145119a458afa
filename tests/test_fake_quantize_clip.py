import pytest
import reference
import torch

from ocsquant import ops
from ocsquant.methods.learned_clips import ClippedInput, mse_clips, percentile_clips

OP = torch.ops.ocsquant.fake_quantize_clip.default
BACKWARD = torch.ops.ocsquant.fake_quantize_clip_backward.default
RANGES = [
    (-2.5, 2.5),
    (-0.7, 3.1),
    (0.4, 2.0),
    (-3.0, -0.2),
    (5.0, 9.0),
    (-1e-3, 1e-3),
    (1.0, 1.0),
    (2.0, -1.0),
    (0, 0),
]
SHAPES = [(), (1,), (7,), (3, 64), (5, 4095), (2, 4097), (0, 5), (33, 1000)]


def clips(low, high, dtype=torch.float32):
    return torch.tensor([low], dtype=dtype), torch.tensor([high], dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_has_the_bits_of_the_reference(shape, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    for low, high in RANGES:
        for bits in (2, 4, 8):
            for align_zero in (False, True):
                c = clips(float(low), float(high))
                y = ops.fake_quantize_clip(x, *c, bits, align_zero)
                assert torch.equal(y, reference.fake_quantize_clip(x, *c, bits, align_zero))
                grid = ClippedInput.between(*c, bits, align_zero)
                assert torch.equal(y, grid.apply(x.float()).to(dtype))
                assert (y.float().unique().numel()) <= 2**bits
                if align_zero:
                    zero = ops.fake_quantize_clip(torch.zeros(1), *c, bits, True)
                    assert zero == 0 or low > 0 or high < 0 or low >= high


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("low", "high"), RANGES[:6])
def test_the_closed_form_is_the_gradient_of_the_straight_through_composite(bits, low, high):
    """float64, against autograd through z + (rint(z) - z).detach()."""
    x = (torch.randn(400, dtype=torch.float64) * 3).requires_grad_()
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (low, high))
    n = 2**bits - 1
    place = (torch.minimum(torch.maximum(x, a), b) - a) * (n / (b - a))
    y = (place + (torch.round(place) - place).detach()) / (n / (b - a)) + a
    g = torch.randn(400, dtype=torch.float64)
    y.backward(g)
    dx, da, db = reference.fake_quantize_clip_backward(g, x.detach(), a.detach(), b.detach(), bits)
    assert (dx - x.grad).abs().max() <= 1e-12
    assert abs(da - a.grad) <= 1e-12 * g.abs().sum()
    assert abs(db - b.grad) <= 1e-12 * g.abs().sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), RANGES[:6])
def test_backward(shape, dtype, low, high):
    x, g = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    c = clips(low, high)
    for bits in (2, 4, 8):
        dx, da, db = BACKWARD(g, x, *c, bits)
        expected = reference.fake_quantize_clip_backward(g, x, *(v.double().reshape(()) for v in c), bits)
        assert torch.equal(dx, expected[0].to(dtype))
        # A value on the edge between two levels may fall to either in float32.
        slack = 1e-4 + g.abs().float().sum() * 1e-5 + 2 * g.abs().max().float() / 2**bits if g.numel() else 0.0
        assert abs(da.double() - expected[1]) <= slack
        assert abs(db.double() - expected[2]) <= slack
        assert da.shape == db.shape == (1,)


def test_sums_of_a_million_terms_are_as_good_as_in_float64():
    x, g = torch.randn(1_000_000), torch.rand(1_000_000) + 0.5
    low, high = clips(-1.0, 1.5)
    _, da, db = BACKWARD(g, x, low, high, 4)
    n = 15
    place = (x - low) * (n / (high - low))  # the kernel's own rounding decisions, everything after them in float64
    exact = (x.double() - low.double()) * (n / (high.double() - low.double()))
    inside = (x > low) & (x < high)
    error = (g.double() * (exact - torch.round(place).double()) / n)[inside].sum()
    for got, expected in ((da, g.double()[x <= low].sum() + error), (db, g.double()[x >= high].sum() - error)):
        assert abs(got.double() - expected) <= 1e-5 * abs(expected)


def test_the_result_does_not_depend_on_the_number_of_threads():
    x, g, c = torch.randn(700_001), torch.randn(700_001), clips(-2.0, 2.0)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(BACKWARD(g, x, *c, 4))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_descent_finds_the_best_range_of_a_gaussian():
    """A residual clamped for in-range values, as in the published kernel, would end at +-2.88."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    low, high = (c.requires_grad_() for c in clips(-4.0, 4.0))
    for step in range(400):
        loss = (ops.fake_quantize_clip(x, low, high, 4) - x).square().mean()
        loss.backward()
        with torch.no_grad():
            for c in (low, high):
                c.sub_(c.grad, alpha=20.0 if step < 300 else 4.0)
                c.grad = None
    assert low.item() == pytest.approx(-2.57, abs=0.1)
    assert high.item() == pytest.approx(2.57, abs=0.1)


def test_the_initial_clips():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    low, high = mse_clips(x, 4, False)
    assert low == pytest.approx(-2.57, abs=0.1)
    assert high == pytest.approx(2.57, abs=0.1)
    grid = ClippedInput.between(torch.tensor(low), torch.tensor(high), 4, False)
    assert (grid.apply(x) - x).square().mean() == pytest.approx(0.012, abs=3e-4)
    low, high = mse_clips(torch.nn.functional.silu(x), 4, False)
    assert low == pytest.approx(-0.28, abs=0.15)
    assert mse_clips(torch.full((9,), 2.0), 4, False) == (2.0, 2.0)
    assert percentile_clips(torch.arange(1001.0)) == (1.0, 999.0)


def test_special_values():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3, -0.0], requires_grad=True)
    low, high = (c.requires_grad_() for c in clips(-1.0, 1.0))
    y = ops.fake_quantize_clip(x, low, high, 4)
    assert y[0].isnan()
    assert y[1:3].tolist() == [1.0, -1.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert low.grad.isnan()  # what a NaN is worth to a clip is not a number
    x = torch.tensor([2.0, -2.0, 0.3])
    dx, dlow, dhigh = BACKWARD(torch.tensor([1.0, 2.0, 0.0]), x, *clips(-1.0, 1.0), 4)
    assert (dx.tolist(), dlow.item(), dhigh.item()) == ([0.0, 0.0, 0.0], 2.0, 1.0)
    assert ops.fake_quantize_clip(x, *clips(float("nan"), 1.0), 4).isnan().all()


def test_clips_of_other_dtypes_and_layouts():
    x = torch.randn(8, 6).T.to(torch.bfloat16)
    wide = ops.fake_quantize_clip(x, *clips(-1.5, 1.5), 4)
    narrow = ops.fake_quantize_clip(x, *clips(-1.5, 1.5, torch.bfloat16), 4)
    scalars = ops.fake_quantize_clip(x, torch.tensor(-1.5), torch.tensor(1.5), 4)
    assert torch.equal(wide, narrow)
    assert torch.equal(wide, scalars)
    assert wide.is_contiguous()
    low = torch.tensor([-1.5], dtype=torch.bfloat16, requires_grad=True)
    ops.fake_quantize_clip(x, low, torch.tensor([1.5]), 4).sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_compiles_with_its_backward():
    torch.compiler.reset()
    x, low, high = torch.randn(6, 40, requires_grad=True), *(c.requires_grad_() for c in clips(-1.0, 1.5))
    run = torch.compile(lambda *a: ops.fake_quantize_clip(*a, 4), fullgraph=True, backend="aot_eager")
    grads = []
    for function in (run, lambda *a: ops.fake_quantize_clip(*a, 4)):
        function(x, low, high).square().sum().backward()
        grads.append([t.grad for t in (x, low, high)])
        x.grad = low.grad = high.grad = None
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, c = torch.randn(4, 9).to(dtype), clips(-1.0, 1.5)
    torch.library.opcheck(OP, (x, *c, 4))
    torch.library.opcheck(OP, (x.T, *c, 4, True))
    torch.library.opcheck(BACKWARD, (x, x, *c, 4))
