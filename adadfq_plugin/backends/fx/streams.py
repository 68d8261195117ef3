"""Which calls of a traced model belong to a residual stream that LayerNorm reads; they stay in floating point."""

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from adadfq_plugin.backends.fx.graphs import MOVES
from adadfq_plugin.backends.fx.trial import JOINING, CallSite, numbered
from adadfq_plugin.streams import normed_sums, readers

__all__ = ["REASON", "normed_streams"]

SUMS = (operator.add, torch.add, operator.mul, torch.mul, "add", "mul")
NORMS = (nn.LayerNorm, nn.RMSNorm)
NORM_CALLS = (F.layer_norm, torch.layer_norm, F.rms_norm)
REASON = "a stream of sums that LayerNorm reads"


def normed_streams(traced: fx.GraphModule) -> list[CallSite]:
    """The sums that a LayerNorm reads, directly or after further sums, and the LayerNorms that read one.

    Args:
        traced: the result of `traceable`.
    """

    def called(node: fx.Node) -> object:
        """The function, the method's name, or the module's class."""
        return type(traced.get_submodule(str(node.target))) if node.op == "call_module" else node.target

    def is_sum(node: fx.Node) -> bool:  # torch.ao rounds what it joins as well
        return called(node) in (*SUMS, *JOINING) and "dtype" in node.meta

    def is_norm(node: fx.Node) -> bool:
        what = called(node)
        return what in NORM_CALLS or (isinstance(what, type) and issubclass(what, NORMS))

    def moves(node: fx.Node) -> bool:
        return called(node) in MOVES

    sums = normed_sums(traced.graph, is_sum=is_sum, is_norm=is_norm, moves=moves)
    found = sums | {each for node in sums for each in readers(node, moves) if is_norm(each)}
    return [
        CallSite(node.op, name, None if node.op == "call_module" else index, REASON)
        for node, name, index in numbered(traced.graph)
        if node in found
    ]
