"""Padding calls folded into the convolution or pooling that follows them, where that is exact."""

import math
from typing import Any

import torch
from torch import fx, nn

__all__ = ["fold_padding"]


def fold_padding(graph: fx.Graph, attributes: dict[str, Any]) -> None:
    """Fold ``F.pad`` calls into the one convolution or max pooling that uses them.

    Symmetric zero padding becomes the padding of the ``nn.Conv2d``. Padding a max pooling with minus infinity, which
    no quantized tensor can hold, becomes the pooling's own padding, and ``ceil_mode`` for one side's excess.

    Args:
        graph: The graph, changed in place.
        attributes: The modules of the graph by name; changed where a convolution gets padding.
    """
    for module in attributes.values():
        if type(module) is nn.Conv2d:
            _resolve_names(module)
    for pad in list(graph.nodes):
        if pad.target is not nn.functional.pad or len(pad.users) != 1:
            continue
        user = next(iter(pad.users))
        source, sides, value = _pad_arguments(pad)
        if value is None:
            continue
        module = attributes[user.target] if user.op == "call_module" else None
        if type(module) is nn.Conv2d and value == 0:
            folded = _uses(graph, user.target) == 1 and _fold_convolution(module, sides)
        else:
            folded = value == -math.inf and _fold_max_pool(user, source, sides)
        if folded:
            user.replace_input_with(pad, source)
            graph.erase_node(pad)


def _resolve_names(module: nn.Conv2d) -> None:
    """Write padding by name ("same", "valid") as numbers where it is symmetric: integer kernels know numbers only."""
    if isinstance(module.padding, str):
        geometry = zip(module.dilation, module.kernel_size, strict=True)
        total = [0 if module.padding == "valid" else d * (k - 1) for d, k in geometry]
        if all(t % 2 == 0 for t in total):
            module.padding = (total[0] // 2, total[1] // 2)


def _pad_arguments(pad: fx.Node) -> tuple[fx.Node, tuple[int, ...], float | None]:
    """Return input, the four sides (left, right, top, bottom) and the value; value None if it is another padding."""
    names = ("input", "pad", "mode", "value")
    bound: dict[str, Any] = {**dict(zip(names, pad.args, strict=False)), **pad.kwargs}
    sides = tuple(bound["pad"])
    numbers = len(sides) == 4 and all(type(side) is int for side in sides)
    if bound.get("mode", "constant") != "constant" or not numbers:
        return bound["input"], sides, None
    value = bound.get("value")
    return bound["input"], sides, 0.0 if value is None else value


def _fold_convolution(module: nn.Conv2d, sides: tuple[int, ...]) -> bool:
    """Give a convolution the padding of its input; return whether that is exact."""
    symmetric = sides[0] == sides[1] >= 0 and sides[2] == sides[3] >= 0
    if not symmetric or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    module.padding = (sides[2] + module.padding[0], sides[0] + module.padding[1])
    return True


def _uses(graph: fx.Graph, target: Any) -> int:
    return sum(node.op == "call_module" and node.target == target for node in graph.nodes)


def _fold_max_pool(user: fx.Node, source: fx.Node, sides: tuple[int, ...]) -> bool:
    """Rewrite ``F.max_pool2d`` of a padded input as one that pads itself; return whether that is exact."""
    if user.op != "call_function" or user.target not in (torch.max_pool2d, nn.functional.max_pool2d):
        return False
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    bound: dict[str, Any] = {**dict(zip(names, user.args, strict=False)), **user.kwargs}
    kernel, stride = _pair(bound["kernel_size"]), _pair(bound.get("stride") or bound["kernel_size"])
    plain = _pair(bound.get("padding", 0)) == (0, 0) and _pair(bound.get("dilation", 1)) == (1, 1)
    if not plain or bound.get("ceil_mode", False):
        return False
    before, after = (sides[2], sides[0]), (sides[3], sides[1])
    if not all(0 <= b <= a and b <= k // 2 for k, b, a in zip(kernel, before, after, strict=True)):
        return False
    settings: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": before,
        "ceil_mode": before != after,
    }
    unpadded = torch.empty(source.meta["shape"], device="meta")
    if torch.max_pool2d(unpadded, **settings).shape != user.meta["shape"]:
        return False  # ceil_mode adds other windows than the padding did
    user.args, user.kwargs = (user.args[0],), settings
    return True


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
