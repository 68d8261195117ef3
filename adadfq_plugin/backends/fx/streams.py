"""Residual streams that LayerNorm reads: their sums stay in floating point, as they do on the other toolkit.

Their outliers decide the range: at 4 bits the sums alone cost a vision transformer more than all its weights.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from adadfq_plugin.backends.fx.unquantizable import CallSite, call_name

__all__ = ["normed_streams"]

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
    found: set[fx.Node] = set()
    for node in reversed(traced.graph.nodes):
        if _called(traced, node) in SUMS and "dtype" in node.meta:
            readers = list(_readers(traced, node))
            if any(each in found or _is_norm(traced, each) for each in readers):
                found |= {node, *(each for each in readers if _is_norm(traced, each))}
    sites, calls = [], defaultdict[str, int](int)
    for node in traced.graph.nodes:
        name = call_name(node)
        index, calls[name] = calls[name], calls[name] + 1
        if node in found:
            sites.append(CallSite(node.op, name, None if node.op == "call_module" else index, REASON))
    return sites


def _called(traced: fx.GraphModule, node: fx.Node) -> object:
    """The function, the method's name, or the module's class."""
    return type(traced.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _is_norm(traced: fx.GraphModule, node: fx.Node) -> bool:
    called = _called(traced, node)
    return called in NORM_CALLS or (isinstance(called, type) and issubclass(called, NORMS))


def _readers(traced: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """What reads a tensor, in whatever shape."""
    for user in node.users:
        if _called(traced, user) in RESHAPES:
            yield from _readers(traced, user)
        else:
            yield user
