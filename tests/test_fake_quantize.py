"""The learned fake quantizer: levels, gradients, range search, torch.ao's interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import disable_observer, enable_observer
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import MinMaxObserver

from adadfq_plugin import fake_quantize, ranges
from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.ranges import search_range

pytestmark = pytest.mark.usefixtures("seeded")


def quantizer(x: Tensor, bits: int = 4, *, trained: bool = True, **kwargs: object) -> LearnedFakeQuantize:
    made = LearnedFakeQuantize(quant_min=0, quant_max=2**bits - 1, **kwargs)  # type: ignore[arg-type]
    made(x)
    made.disable_observer()
    made.log_scale.requires_grad_(trained)
    return made


def per_channel(bits: int = 4) -> LearnedFakeQuantize:
    return LearnedFakeQuantize(
        -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.qint8, torch.per_channel_symmetric, ch_axis=0
    )


def lsq_twin(
    x: np.ndarray, scale: float, zero: int, low: int, high: int, grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """LSQ (Esser et al., equations 1 to 3) in float64, with a zero point; gradient for log s."""
    t = x / scale
    q = np.clip(np.round(t) + zero, low, high)
    inside = (t > low - zero) & (t < high - zero)
    slope = np.where(inside, (q - zero) - t, q - zero)
    return scale * (q - zero), grad * inside, float((grad * slope).sum() * scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_forward_and_gradients_against_the_float64_twin(bits: int, shift: float) -> None:
    x = (torch.randn(500) * 2 + shift).requires_grad_()
    made = quantizer(x.detach() * 0.6, bits)  # some values are clipped
    upstream = torch.randn(500)
    y = made(x)
    y.backward(upstream)
    scale, zero = made.scale.item(), int(made.zero_point)
    expected, for_x, for_log_scale = lsq_twin(
        x.detach().double().numpy(), scale, zero, made.quant_min, made.quant_max, upstream.double().numpy()
    )
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), for_x, rtol=1e-6)  # type: ignore[union-attr]
    assert made.log_scale.grad is not None
    np.testing.assert_allclose(made.log_scale.grad.item(), for_log_scale, rtol=1e-3, atol=1e-3)


def test_infinite_values_take_the_last_levels_of_the_others_range() -> None:
    x = torch.tensor([-torch.inf, -1.0, 2.0, torch.inf])
    made = quantizer(x)
    assert made.scale.item() == pytest.approx(0.2)
    torch.testing.assert_close(made(x), torch.tensor([-1.0, -1.0, 2.0, 2.0]))
    made.reset()
    made.enable_observer()
    made(torch.full((4,), -torch.inf))  # a row that is masked as a whole
    made(x)
    assert made.scale.item() == pytest.approx(0.2)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_channels_may_be_counted_from_the_last(axis: int) -> None:
    weight = torch.randn(3, 4, 2, 2)
    results = []
    for each in (axis, axis - 4):
        made = LearnedFakeQuantize(-8, 7, torch.qint8, torch.per_channel_symmetric, ch_axis=each)
        results.append((made(weight), made.settled(weight)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_per_channel_gradients_are_those_of_each_channel() -> None:
    weight = torch.randn(3, 4, 2, 2, requires_grad=True)
    made = per_channel(3)
    made(weight.detach() * 0.5)
    made.disable_observer()
    made.log_scale.requires_grad_(True)
    upstream = torch.randn_like(weight)
    y = made(weight)
    y.backward(upstream)
    for channel in range(3):
        expected, for_w, for_scale = lsq_twin(
            weight.detach()[channel].double().numpy(),
            made.scale[channel].item(),
            0,
            -4,
            3,
            upstream[channel].double().numpy(),
        )
        np.testing.assert_allclose(y.detach()[channel].numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weight.grad[channel].numpy(), for_w, rtol=1e-6)  # type: ignore[index]
        assert made.log_scale.grad is not None
        np.testing.assert_allclose(made.log_scale.grad[channel].item(), for_scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_integer_type_has_the_same_levels(bits: int) -> None:
    x = torch.randn(1000)
    made = quantizer(x * 0.5, bits, trained=False)
    low, high = made.bounds()
    scale, zero = made.calculate_qparams()
    integer = torch.quantize_per_tensor(x, scale.item(), int(zero), torch.quint8).clamp(
        low.item(), high.item()
    )
    assert torch.equal(integer.dequantize(), made(x))
    assert int(integer.int_repr().max()) <= 2**bits - 1


def test_a_settled_weight_is_rounded_alike_by_step_sizes_that_differ_in_their_last_bit() -> None:
    made = per_channel()
    weight = torch.randn(3, 1000)
    made(weight)
    made.disable_observer()
    step = made.scale.detach()[:, None]
    weight[:, ::2] = (torch.randint(-3, 3, (3, 500)) + 0.5) * step  # midway between two levels
    weight[:, 1] = 100
    settled = made.settled(weight)
    rounded = made(settled)
    torch.testing.assert_close(rounded, made(weight))
    assert float((settled - weight)[:, 3::2].abs().max()) == 0
    assert torch.equal(settled[:, 1], made.bounds()[1].expand(3))
    for beyond in (0.0, torch.inf):
        other = torch.nextafter(step, torch.full_like(step, beyond))
        assert not torch.equal((weight / other).round(), (weight / step).round())
        assert torch.equal((settled / other).round(), (rounded / step).round())


def test_averages_round_their_ties_to_even() -> None:
    made = quantizer(torch.tensor([0.0, 3.3]), 2, trained=False)
    made.averages = True
    step = made.scale.item()
    ties = torch.tensor([0.5, 1.5, 2.5]) * step
    assert torch.equal((made(ties) / step).round(), torch.tensor([0.0, 2.0, 2.0]))


def test_a_large_weight_is_searched_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 30)
    steps = []
    for most in (2**18, 60, 1):  # in one piece, in pairs of rows, row by row
        monkeypatch.setattr(ranges, "IN_CACHE", most)
        made = per_channel()
        made.sampling = True
        made(weight)
        made.search()
        steps.append(made.scale)
    assert len(steps[0]) == 7
    assert torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], steps[2])


def test_the_sample_of_many_small_batches_is_bounded_and_of_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake_quantize, "MOST", 1000)
    made = quantizer(torch.zeros(1), 8)
    made.enable_observer()
    made.sampling = True
    for batch in range(40):
        made(torch.full((100,), float(batch)))
        assert sum(each.numel() for each in made._sample) <= 1000
    kept = torch.cat(made._sample, 1)
    assert kept.numel() > 300
    assert len(kept.unique()) == 40
    assert abs(kept.mean().item() - 19.5) < 3  # early and late batches have the same share
    made.search()
    assert made.scale.item() * 255 == pytest.approx(39, rel=0.02)
    made(torch.full((100,), 1.0))
    assert made._sample[0].numel() == 100  # the next search starts anew


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    ("channels", "side"), [(64, 56), (512, 7), (1024, 14), (16, 112), (96, 24), (3, 224)]
)
def test_the_sample_is_of_all_rows_and_columns_alike(batch: int, channels: int, side: int) -> None:
    """Sides of networks for ImageNet are 7, 14, 28: every 63rd value lies in one column of seven."""
    made = LearnedFakeQuantize()
    made.sampling = True
    columns = torch.arange(float(side)).expand(batch, channels, side, side)
    for places in (columns, columns.mT):
        made(places)
        counts = made._sample.pop().flatten().long().bincount(minlength=side).float()
        assert counts.sum() >= min(fake_quantize.SAMPLE / 2, places.numel())
        assert (counts / counts.mean() - 1).abs().max() < 0.05


def test_search_is_never_worse_than_min_max() -> None:
    rows = torch.cat((torch.randn(4, 500), torch.full((4, 1), 20.0)), dim=1)
    scale, zero = search_range(rows, 0, 15, symmetric=False)

    def error(s: Tensor, z: Tensor) -> Tensor:
        q = ((rows / s[:, None]).round() + z[:, None]).clamp(0, 15)
        return (((q - z[:, None]) * s[:, None]) - rows).square().mean(1)

    spread = (rows.amax(1) - rows.amin(1)) / 15
    offset = (-rows.amin(1) / spread).round()
    assert (error(scale, zero) < 0.9 * error(spread, offset)).all()


@given(st.integers(2, 8), st.floats(1e-3, 1e3), st.floats(-5, 5))
def test_zero_is_exact(bits: int, spread: float, shift: float) -> None:
    x = torch.linspace(-1, 1, 64) * spread + shift * spread
    made = quantizer(x, bits, trained=False)
    assert made(torch.zeros(3)).eq(0).all()
    assert 0 <= int(made.zero_point) <= 2**bits - 1


def test_torch_ao_toggles_it() -> None:
    made = LearnedFakeQuantize()
    made.apply(disable_observer)
    assert torch.equal(made(torch.ones(3)), made(torch.ones(3)))
    assert made.upper.item() == -torch.inf
    made.apply(enable_observer)
    made(torch.ones(3))
    assert made.upper.item() == 1


def test_its_switches_stay_where_python_reads_them() -> None:
    fake_quantize = quantizer(torch.randn(64))
    fake_quantize.disable_observer()
    moved = fake_quantize.to("meta")
    assert moved.log_scale.device.type == moved.zero_point.device.type == "meta"
    assert (moved.observer_enabled.item(), moved.fake_quant_enabled.item()) == (0, 1)


def test_constant_and_zero_input() -> None:
    made = LearnedFakeQuantize()
    assert torch.isfinite(made(torch.zeros(4))).all()
    assert torch.isfinite(made.scale).all()


def test_state_dict_restores_per_channel_sizes() -> None:
    made = per_channel()
    made(torch.randn(6, 3))
    other = per_channel()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.log_scale, made.log_scale)
    assert other.log_scale.shape == (6,)


def test_like_takes_over_levels_and_scheme() -> None:
    source = FakeQuantize(
        MinMaxObserver, quant_min=0, quant_max=31, dtype=torch.quint8, qscheme=torch.per_tensor_affine
    )
    made = LearnedFakeQuantize.like(source)
    assert (made.quant_min, made.quant_max, made.bits) == (0, 31, 5)
    assert made.dtype is torch.quint8
    assert made.saturates_early()
