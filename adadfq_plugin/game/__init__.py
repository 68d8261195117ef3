"""The zero-sum game: G looks for samples on which Q and P neither agree nor disagree too much.

Refined without Q, they join the pool that Q learns from.
"""

from adadfq_plugin.game.generator import GeneratorPlayer
from adadfq_plugin.game.pace import Pace, Plan, make_plan
from adadfq_plugin.game.pool import ReplayPool, augment, mixed
from adadfq_plugin.game.quantized import QuantizedPlayer

__all__ = [
    "GeneratorPlayer",
    "Pace",
    "Plan",
    "QuantizedPlayer",
    "ReplayPool",
    "augment",
    "make_plan",
    "mixed",
]
