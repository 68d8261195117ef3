"""How much of a converted network integer kernels compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["integer_macs"]


def integer_macs(converted: fx.GraphModule, example: Tensor) -> int:
    """Multiply-adds of one image in torch.ao's integer layers and products.

    Args:
        converted: what ``convert_fx`` returned.
        example: images (N, C, H, W).
    """
    counted = _Counted(converted)
    with torch.no_grad():
        counted.run(example)
    return counted.total // len(example)


class _Counted(fx.Interpreter):
    """Counts what integer kernels do."""

    total = 0

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(target, args, kwargs)
        layer: Any = self.fetch_attr(target)
        if type(layer).__module__.startswith("torch.ao.nn") and callable(getattr(layer, "weight", None)):
            # each weight of an output channel meets each place of the output; transposed, of the input
            places = args[0] if "Transpose" in type(layer).__name__ else output
            self.total += layer.weight()[0].numel() * places.numel()
        return output

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_function(target, args, kwargs)
        if target is torch.ops.quantized.matmul:
            self.total += args[0].shape[-1] * output.numel()
        return output
