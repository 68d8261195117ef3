"""Which calls of a traced model belong to a residual stream that LayerNorm reads; they stay in floating point."""

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from adadfq_plugin.backends.fx.trial import CallSite, numbered
from adadfq_plugin.streams import normed_sums, readers

__all__ = ["REASON", "normed_streams"]

SUMS = (operator.add, torch.add, operator.mul, torch.mul, "add", "mul")
NORMS = (nn.LayerNorm, nn.RMSNorm)
NORM_CALLS = (F.layer_norm, torch.layer_norm, F.rms_norm)
RESHAPES = (
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone"),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
    *(operator.getitem, F.dropout, nn.Dropout, nn.Identity, nn.Flatten),
)
REASON = "a stream of sums that LayerNorm reads"


def normed_streams(traced: fx.GraphModule) -> list[CallSite]:
    """The sums that a LayerNorm reads, directly or after further sums, and the LayerNorms that read one.

    Args:
        traced: the result of `traceable`.
    """

    def called(node: fx.Node) -> object:
        """The function, the method's name, or the module's class."""
        return type(traced.get_submodule(str(node.target))) if node.op == "call_module" else node.target

    def is_sum(node: fx.Node) -> bool:
        return called(node) in SUMS and "dtype" in node.meta

    def is_norm(node: fx.Node) -> bool:
        what = called(node)
        return what in NORM_CALLS or (isinstance(what, type) and issubclass(what, NORMS))

    def is_reshape(node: fx.Node) -> bool:
        return called(node) in RESHAPES

    sums = normed_sums(traced.graph, is_sum=is_sum, is_norm=is_norm, is_reshape=is_reshape)
    found = sums | {each for node in sums for each in readers(node, is_reshape) if is_norm(each)}
    return [
        CallSite(node.op, name, None if node.op == "call_module" else index, REASON)
        for node, name, index in numbered(traced.graph)
        if node in found
    ]
