"""How much of a converted network integer kernels can compute."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["integer_macs"]


def integer_macs(converted: fx.GraphModule, example: Tensor) -> int:
    """Multiply-adds of one image in layers and products of which both operands are dequantized.

    Args:
        converted: what ``convert_pt2e`` returned; Inductor finds its integer kernels at these places.
        example: images (N, C, H, W), of a number that the graph takes.
    """
    counted = _Counted(converted)
    with torch.no_grad():
        counted.run(example)
    return counted.total // (2 * len(example))


class _Counted(fx.Interpreter):
    """Counts the operations whose operands are dequantized."""

    total = 0

    def run_node(self, n: fx.Node) -> Any:
        operands = [_origin(each) for each in n.args[:2] if isinstance(each, fx.Node)]
        if len(operands) < 2 or not all("dequantize" in str(each.target) for each in operands):
            return super().run_node(n)
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.total += int(counter.get_total_flops())
        return result


def _origin(node: fx.Node) -> fx.Node:
    """The node whose values these are, in another shape."""
    while str(node.target).split(".")[1:2] == ["transpose"] or node.target is operator.getitem:
        (node,) = node.all_input_nodes
    return node
