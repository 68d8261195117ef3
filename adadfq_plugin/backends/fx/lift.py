"""Functional calls on a model's own weights, given as the standard `torch.nn` modules that they amount to.

Quantization toolkits fuse and quantize ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Linear`` and the like by their class.
Many models compute the same through a subclass (a convolution that pads or standardises its weights, a BatchNorm with
its activation inside) whose ``forward`` calls the functional form. Whatever the subclass was, the call says it all.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadfq_plugin.backends.fx.layers import FUNCTIONS

__all__ = ["Lifted", "lift"]


@dataclass(frozen=True)
class Lifted:
    """A standard module that does what a functional call does.

    Attributes:
        kind: Class of the module.
        settings: Its constructor's keyword arguments.
        constants: Its parameters and buffers by name; all that the call needs beside its input.
        input: The call's input.
        name: Where the module belongs in the model.
    """

    kind: type[nn.Module]
    settings: dict[str, Any]
    constants: dict[str, Any]
    input: Tensor
    name: str

    def build(self) -> nn.Module:
        """Return the module; it shares the call's parameters and buffers."""
        module = self.kind(**self.settings, device="meta")
        for name, value in self.constants.items():
            if value is None or name in module._buffers:
                setattr(module, name, value)
            else:
                is_own = isinstance(value, nn.Parameter)
                setattr(module, name, value if is_own else nn.Parameter(value.detach(), value.requires_grad))
        module.__dict__["_lifted_from"] = self._key()
        return module.eval()

    def is_same(self, module: Any) -> bool:
        """Whether ``module`` was built from the same call on the same weights."""
        return getattr(module, "__dict__", {}).get("_lifted_from") == self._key()

    def _key(self) -> tuple[Any, ...]:
        # Constants that are computed anew at each call have other ids, and then get a module of their own.
        return self.kind, repr(self.settings), tuple(map(id, self.constants.values()))


def _convolution_signature(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> None: ...


def _linear_signature(input: Any, weight: Any, bias: Any = None) -> None: ...


_SIGNATURES: dict[Any, inspect.Signature] = {
    F.conv1d: inspect.signature(_convolution_signature),
    F.linear: inspect.signature(_linear_signature),
    F.batch_norm: inspect.signature(F.batch_norm),
    F.layer_norm: inspect.signature(F.layer_norm),
    F.group_norm: inspect.signature(F.group_norm),
}
_SIGNATURES[F.conv2d] = _SIGNATURES[F.conv3d] = _SIGNATURES[F.conv1d]
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def lift(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    modules: dict[str, nn.Module],
    names: dict[int, str],
    path: str,
) -> Lifted | None:
    """Return the standard module that the call of ``func`` amounts to, or None.

    Args:
        func: A function of `torch.nn.functional`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        modules: The model's modules by qualified name.
        names: Qualified names of the model's parameters and buffers by ``id``.
        path: Qualified name of the module that makes the call.

    Returns:
        The module's description. Whether its constants are constant is for the caller to see.
    """
    try:
        signature = _SIGNATURES.get(func)
    except TypeError:  # not hashable
        return None
    if signature is None:
        return None
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    weight = call["weight"]
    owner, _, attribute = names.get(id(weight), "").rpartition(".")
    describe = _DESCRIBE.get(func, _convolution)
    described = describe(func, call, modules.get(owner if attribute == "weight" else path))
    if described is None:
        return None
    kind, settings, constants = described
    if attribute == "weight" and owner:
        name = owner
    elif path and isinstance(modules[path], kind):
        name = path
    else:
        name = f"{path}.{func.__name__}".lstrip(".")
    return Lifted(kind, settings, constants, call["input"], name)


_Description = tuple[type[nn.Module], dict[str, Any], dict[str, Any]]


def _convolution(func: Any, call: dict[str, Any], owner: nn.Module | None) -> _Description:
    weight = call["weight"]
    settings = {
        "in_channels": weight.shape[1] * call["groups"],
        "out_channels": weight.shape[0],
        "kernel_size": tuple(weight.shape[2:]),
        **{name: call[name] for name in ("stride", "padding", "dilation", "groups")},
        "bias": call["bias"] is not None,
    }
    for name in ("stride", "padding", "dilation"):
        if isinstance(settings[name], (list, torch.Size)):
            settings[name] = tuple(settings[name])
    return FUNCTIONS[func].plain, settings, {"weight": weight, "bias": call["bias"]}


def _linear(func: Any, call: dict[str, Any], owner: nn.Module | None) -> _Description:
    out_features, in_features = call["weight"].shape
    settings = {"in_features": in_features, "out_features": out_features, "bias": call["bias"] is not None}
    return nn.Linear, settings, {"weight": call["weight"], "bias": call["bias"]}


def _batch_norm(func: Any, call: dict[str, Any], owner: nn.Module | None) -> _Description | None:
    # Only a true BatchNorm goes on learning statistics in training mode; a frozen one stays the call that it is.
    if (
        not isinstance(owner, nn.modules.batchnorm._BatchNorm)
        or owner.running_mean is None
        or call["training"]
    ):
        return None
    constants = {name: call[name] for name in ("running_mean", "running_var", "weight", "bias")}
    constants["num_batches_tracked"] = owner.num_batches_tracked
    settings = {
        "num_features": call["running_mean"].numel(),
        "eps": call["eps"],
        "momentum": owner.momentum,
        "affine": call["weight"] is not None,
    }
    return _BATCH_NORMS[call["input"].dim()], settings, constants


def _layer_norm(func: Any, call: dict[str, Any], owner: nn.Module | None) -> _Description:
    settings = {
        "normalized_shape": tuple(call["normalized_shape"]),
        "eps": call["eps"],
        "elementwise_affine": call["weight"] is not None,
        "bias": call["bias"] is not None,
    }
    return nn.LayerNorm, settings, {"weight": call["weight"], "bias": call["bias"]}


def _group_norm(func: Any, call: dict[str, Any], owner: nn.Module | None) -> _Description | None:
    if call["weight"] is None or call["bias"] is None:
        return None
    settings = {"num_groups": call["num_groups"], "num_channels": call["weight"].numel(), "eps": call["eps"]}
    return nn.GroupNorm, settings, {"weight": call["weight"], "bias": call["bias"]}


_DESCRIBE: dict[Any, Callable[[Any, dict[str, Any], nn.Module | None], _Description | None]] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
}
