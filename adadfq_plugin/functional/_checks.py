"""Arguments: their shapes, types and precision; and the two sums that several formulas share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "check_hard_labels",
    "check_temperature",
    "check_weight",
    "checked_logits",
    "cross_entropy",
    "entropy",
    "like",
    "logit_pair",
    "shape_of",
    "upcast",
]


def entropy(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    # The excess over ln C is rounding: a clamp would cut the gradient too, this takes it off the value only.
    excess = (entropy - math.log(logits.shape[1])).clamp(min=0).detach()
    return entropy - excess


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, dim=1)
    if y.shape == logits.shape and y.is_floating_point():
        return -(upcast("y", y) * log_p).sum(dim=1).mean()
    check_hard_labels("y", y, logits, soft=True)
    return -log_p.gather(1, y.long().unsqueeze(1)).mean()


def check_hard_labels(name: str, labels: Tensor, logits: Tensor, *, soft: bool) -> None:
    samples, classes = logits.shape
    integral = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (samples,) or not integral:
        other = f" or floating point of shape ({samples}, {classes})" if soft else ""
        raise ValueError(
            f"{name} must be integers of shape ({samples},){other}; "
            f"got {labels.dtype} of shape {shape_of(labels)}"
        )
    # On a GPU this look would stall the stream; indexing checks the range there.
    if labels.device.type == "cpu" and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(f"{name} must be in [0, {classes}); got {int(labels.min())} to {int(labels.max())}")


def check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be finite and not negative; got {weight}")


def check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and positive; got {temperature}")


def upcast(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {tensor.dtype}")
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def checked_logits(name: str, logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"{name} must have the shape (N, C) with N >= 1 and C >= 2; got {shape_of(logits)}")
    return upcast(name, logits)


def like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> Tensor:
    if tensor.shape != model.shape:
        raise ValueError(
            f"{name} must have the shape of {model_name}, {shape_of(model)}; got {shape_of(tensor)}"
        )
    return upcast(name, tensor)


def logit_pair(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    z_p = checked_logits("z_p", z_p)
    return z_p, like("z_q", z_q, "z_p", z_p)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
