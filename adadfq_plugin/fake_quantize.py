"""A fake quantizer with a learned step size (LSQ), of no toolkit.

Each backend makes it a fake quantizer of its own toolkit: ``class LearnedFakeQuantize(LearnedQuantizer,
FakeQuantizeBase)``. The toolkit's toggles then work on it, and its convert reads ``calculate_qparams``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adadfq_plugin.errors import ModelError
from adadfq_plugin.ranges import SMALLEST_STEP, affine, search_range

__all__ = ["LearnedQuantizer"]

SAMPLE = 32768
"""Activations kept from each observed batch for the range search: of fewer, one large value may decide."""
MOST = 2**20
"""Activations kept in all: of many small batches fewer each, drawn at random."""
TIE_GRID = 4096
"""Fractions of a level: coarse enough to wipe out float noise around one half, fine enough to be exact."""
NEAR_TIE = 1e-4
"""Fractions of a level from the middle of two, within which another device's step size may decide otherwise."""
SWITCHES = {"observer_enabled", "fake_quant_enabled"}
PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
QuantizerT = TypeVar("QuantizerT", bound="LearnedQuantizer")


class _LearnedStep(torch.autograd.Function):
    r"""Fake quantization with LSQ's gradients, written so that it costs no more than an activation.

    With :math:`y = s (q - z)` the gradient for :math:`\log s` is :math:`\sum g\,(y - x)` over the values
    inside the range and :math:`\sum g\,y` over the clipped ones: two inner products of tensors that the
    neighbouring layers keep anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, zero: Tensor, low: int, high: int, axis: int, averages: bool
    ) -> Tensor:
        shape = [1] * x.ndim
        if axis >= 0:
            shape[axis] = -1
        scale: Any = log_scale.exp().view(shape)
        zero_point: Any = zero.view(shape)
        if axis < 0 and x.device.type == "cpu":  # numbers are faster than one-element tensors
            scale, zero_point = scale.item(), int(zero)
        below, above = low - zero_point, high - zero_point
        y = torch.mul(x, 1 / scale)
        if averages:
            y = y.mul_(TIE_GRID).round_().mul_(1 / TIE_GRID)
        y = y.round_().clamp_(below, above).mul_(scale)
        ctx.save_for_backward(x, y)
        ctx.bounds, ctx.axis = (below * scale, above * scale), axis
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, y = ctx.saved_tensors
        low, high = ctx.bounds
        if isinstance(low, Tensor):
            inside = grad * ((x > low) & (x < high))
        else:
            inside = torch.ops.aten.hardtanh_backward(grad, x, low, high)
        if not ctx.needs_input_grad[1]:
            return inside, None, None, None, None, None, None
        if ctx.axis >= 0:
            others = [dim for dim in range(x.ndim) if dim != ctx.axis]
            for_scale = (grad * y - inside * x).sum(others)
        else:
            for_scale = (_dot(grad, y) - _dot(inside, x)).view(1)
        return inside, for_scale, None, None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    formats = [torch.contiguous_format] + [torch.channels_last] * (a.ndim == 4)
    if any(a.is_contiguous(memory_format=each) and b.is_contiguous(memory_format=each) for each in formats):
        flat = (a.numel(),), (1,)  # in the order of the memory
        return torch.dot(a.as_strided(*flat), b.as_strided(*flat))
    return (a * b).sum()


def _stride(count: int) -> int:
    """A stride that leaves about ``SAMPLE`` values of so many, of all channels, rows and columns alike."""
    # one with a divisor of the width would come by the same few columns for ever
    return next(each for each in itertools.count(max(1, count // SAMPLE)) if math.gcd(each, count) == 1)


def _part(rows: Tensor, share: float) -> Tensor:
    """A copy of that share of the columns, drawn at random."""
    if share == 1:
        return rows.clone()
    return rows[:, torch.rand(rows.shape[1], device=rows.device) < share]


class LearnedQuantizer(nn.Module):
    r"""Fake quantization :math:`\hat x = s\,(\mathrm{clip}(\mathrm{round}(x/s) + z, l, h) - z)`, s learned.

    The step size is kept as its logarithm, so that one learning rate fits scales of any size. Its gradient
    is LSQ's (Esser et al., ICLR 2020, equation 3) times s. The toolkit's own base class brings the switches
    ``observer_enabled`` and ``fake_quant_enabled``.

    With the observer on, it sees batches: the range is that of all values seen (min/max), until
    :meth:`search` replaces it by the range of least squared error over a sample of them.

    Args:
        quant_min: smallest level l.
        quant_max: largest level h.
        dtype: integer type of the converted tensor.
        qscheme: per tensor or per channel, affine or symmetric.
        ch_axis: channel axis of per-channel schemes.
        boundary_max: largest level where the tensor is the network's input or output; None: as elsewhere.
    """

    observer_enabled: Tensor
    fake_quant_enabled: Tensor
    log_scale: nn.Parameter
    zero_point: Tensor
    lower: Tensor
    upper: Tensor

    def __init__(
        self,
        quant_min: int = 0,
        quant_max: int = 255,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        ch_axis: int = -1,
        boundary_max: int | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        self.quant_min, self.quant_max, self.dtype = quant_min, quant_max, dtype
        self.qscheme, self.ch_axis, self.boundary_max = qscheme, ch_axis, boundary_max
        self.is_dynamic = False
        self.per_channel, self.symmetric = qscheme in PER_CHANNEL, qscheme in SYMMETRIC
        self.log_scale = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("lower", torch.full((1,), torch.inf))
        self.register_buffer("upper", torch.full((1,), -torch.inf))
        self.averages = False
        """Whether averages or interpolations arrive here: their ties are rounded to even, as integer kernels do."""
        self.limits: tuple[float, float] | None = None
        """Bounds of an activation (ReLU6) that this quantizer stands for."""
        self.ndim = 0
        """Dimensions of what was observed."""
        self._sample: list[Tensor] = []
        self._share = 1.0
        self.sampling = False

    @classmethod
    def like(cls: type[QuantizerT], other: nn.Module) -> QuantizerT:
        """One with the levels, type and scheme of a toolkit's fake quantizer or observer."""
        observer: Any = getattr(other, "activation_post_process", other)
        if isinstance(other, cls):
            return other
        return cls(
            quant_min=int(getattr(other, "quant_min", observer.quant_min)),
            quant_max=int(getattr(other, "quant_max", observer.quant_max)),
            dtype=observer.dtype,
            qscheme=observer.qscheme,
            ch_axis=int(getattr(observer, "ch_axis", -1)),
        )

    @property
    def activation_post_process(self: QuantizerT) -> QuantizerT:
        """The observer, where toolkits look for it: this module observes for itself."""
        return self

    @activation_post_process.deleter
    def activation_post_process(self) -> None:
        """Left alone: torch.ao takes observers away from modules that its conversion leaves in float."""

    @property
    def eps(self) -> float:
        """Smallest step size."""
        return float(SMALLEST_STEP)

    @property
    def scale(self) -> Tensor:
        """Step size s: (1,) or (channels,)."""
        return self.log_scale.exp()

    @property
    def bits(self) -> int:
        """Width of the levels."""
        return (self.quant_max - self.quant_min).bit_length()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as the toolkit's convert takes them."""
        return self.scale.detach(), self.zero_point

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedQuantizer:
        """Moves all but the switches: each call reads them, and would wait for another device to tell."""
        # a copy of an exported graph brings the attributes alone that it calls
        switches = {name: self._buffers[name] for name in SWITCHES & self._buffers.keys()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(switches)
        return self

    def set_levels(self, quant_min: int, quant_max: int) -> None:
        """Other levels; the range is to be set again."""
        self.quant_min, self.quant_max = quant_min, quant_max

    def forward(self, X: Tensor) -> Tensor:
        if not isinstance(X, Tensor):  # toolkits take every pooling for one that gives a tensor
            raise ModelError(
                f"a quantizer stands behind a call that gives a {type(X).__name__} and no tensor, such as a pooling "
                "with return_indices=True: give that call no QConfig"
            )
        observing, quantizing = bool(self.observer_enabled), bool(self.fake_quant_enabled)
        if self.limits is not None and (observing or not quantizing):
            X = X.clamp(*self.limits)
        if observing:
            self._observe(X.detach())
        if not quantizing:
            return X
        return self._fake_quantize(X)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        axis = self.channel_axis(x.ndim)
        quantized: Tensor = _LearnedStep.apply(
            x, self.log_scale, self.zero_point, self.quant_min, self.quant_max, axis, self.averages
        )
        return quantized

    def channel_axis(self, ndim: int) -> int:
        """The channel axis of a tensor of so many dimensions, counted from the first; -1 where one step is for all."""
        return self.ch_axis % ndim if self.per_channel else -1

    def _rows(self, x: Tensor) -> Tensor:
        return (
            x.movedim(self.ch_axis, 0).reshape(x.shape[self.ch_axis], -1)
            if self.per_channel
            else x.reshape(1, -1)
        )

    def _observe(self, x: Tensor) -> None:
        if x.numel() == 0:  # a transformer without prefix tokens splits off none
            return
        self.ndim = x.ndim
        rows = self._rows(x).float()
        lower, upper = rows.amin(1), rows.amax(1)
        infinite = lower.isinf() | upper.isinf()
        if bool(infinite.any()):  # a mask, or padding for a maximum: it takes the last level
            rows = rows.masked_fill(rows.isinf(), 0)
            lower, upper = rows.amin(1), rows.amax(1)
        if self.per_channel:  # a weight: what counts is the newest
            self.lower, self.upper = lower, upper
        else:
            self.lower, self.upper = torch.minimum(self.lower, lower), torch.maximum(self.upper, upper)
        scale, zero = affine(
            self.lower.clamp_max(0), self.upper.clamp_min(0), self.quant_min, self.quant_max, self.symmetric
        )
        self._set(scale, zero)
        if self.sampling:
            self._keep(rows)

    def _keep(self, rows: Tensor) -> None:
        """Values for the range search: the newest of a weight, some of every batch of activations."""
        if self.per_channel:
            self._sample = [rows]
            return
        self._sample.append(_part(rows[:, :: _stride(rows.shape[1])], self._share))
        if sum(each.shape[1] for each in self._sample) > MOST:
            self._share /= 2
            self._sample = [_part(each, 0.5) for each in self._sample]

    def _set(self, scale: Tensor, zero_point: Tensor) -> None:
        log_scale = scale.detach().clamp_min(SMALLEST_STEP).log()
        if log_scale.shape == self.log_scale.shape:
            self.log_scale.data.copy_(log_scale)
        else:
            self.log_scale = nn.Parameter(log_scale, requires_grad=self.log_scale.requires_grad)
        self.zero_point = zero_point.to(torch.int32)

    def fix(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets the range from outside, goes where it is, and stops observing."""
        self.to(scale.device)
        self._set(scale.reshape(-1), zero_point.reshape(-1))
        self.observer_enabled[0] = 0

    def reset(self) -> None:
        """Forgets what was observed."""
        self.lower, self.upper = (
            torch.full_like(self.lower, torch.inf),
            torch.full_like(self.upper, -torch.inf),
        )
        self._forget()

    def _forget(self) -> None:
        self._sample.clear()
        self._share = 1.0

    def search(self) -> None:
        """Sets the range of least squared error over the observed sample, and forgets the sample."""
        if self._sample:
            x = torch.cat(self._sample, dim=1)
            self._set(*search_range(x, self.quant_min, self.quant_max, symmetric=self.symmetric))
        self._forget()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that a level stands for, each (1,) or (channels,)."""
        scale, zero = self.scale.detach(), self.zero_point
        return (self.quant_min - zero) * scale, (self.quant_max - zero) * scale

    def along(self, values: Tensor, ndim: int) -> Tensor:
        """One value a channel, or one for all, in the shape that goes with a tensor of so many dimensions."""
        axis = self.channel_axis(ndim)
        return values.view([-1 if dim == axis else 1 for dim in range(ndim)])

    @torch.no_grad()
    def settled(self, weight: Tensor) -> Tensor:
        """The weight as it is converted: nothing of it beyond the last level, nothing midway between two.

        An exponential's last bit differs from device to device, and one weight on the other level moves the
        logits of a network of 3 bits by up to a fifth of their deviation.
        """
        scale, low, high = (self.along(each, weight.ndim) for each in (self.scale, *self.bounds()))
        level = weight / scale
        midway = (level - level.floor() - 0.5).abs() < NEAR_TIE
        return torch.where(midway, self._fake_quantize(weight), weight).clamp(low, high)

    def saturates_early(self) -> bool:
        """Whether the integer type holds levels beyond this quantizer's own."""
        limits = torch.iinfo(
            {torch.quint8: torch.uint8, torch.qint8: torch.int8}.get(self.dtype, torch.int32)
        )
        return self.quant_min > limits.min or self.quant_max < limits.max

    def extra_repr(self) -> str:
        return f"levels=[{self.quant_min}, {self.quant_max}], dtype={self.dtype}, qscheme={self.qscheme}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # per-channel sizes are not known before the first batch
        for name in ("log_scale", "zero_point", "lower", "upper"):
            value = state_dict.get(prefix + name)
            current = getattr(self, name)
            if value is not None and value.shape != current.shape:
                fresh = torch.empty_like(value, device=current.device)
                if name == "log_scale":
                    self.log_scale = nn.Parameter(fresh, requires_grad=current.requires_grad)
                else:
                    setattr(self, name, fresh)
        super()._load_from_state_dict(state_dict, prefix, *args)
