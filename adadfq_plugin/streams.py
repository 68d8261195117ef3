"""Residual streams in a graph of torch.fx, whichever toolkit wrote it.

The outliers of a stream that LayerNorm reads would decide its range: at 4 bits its sums alone cost a vision
transformer more than all its weights. Backends leave them in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Graph, Node

__all__ = ["normed_sums", "readers"]

Test = Callable[[Node], bool]


def normed_sums(graph: Graph, *, is_sum: Test, is_norm: Test, moves: Test) -> set[Node]:
    """The sums that a LayerNorm reads, directly or after further sums.

    Args:
        graph: its nodes in the order in which they run.
        is_sum: whether a node adds or scales, or rounds for another reason what it only passes on.
        is_norm: whether it normalises each token by itself.
        moves: whether its values are those of its inputs, or some of them, in another shape or order. A class token
            is joined with the patches and cut off again between two sums of one stream.
    """
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if is_sum(node) and any(is_norm(each) or each in found for each in readers(node, moves)):
            found.add(node)
    return found


def readers(node: Node, moves: Test) -> Iterator[Node]:
    """What reads a tensor's values, wherever they were moved before."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if moves(user):
                waiting.append(user)
            else:
                yield user
