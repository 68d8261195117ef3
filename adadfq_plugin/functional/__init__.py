r"""The formulas of AdaDFQ and the metrics beside them, as pure functions of tensors.

Nothing here knows a module, a hook or a quantization toolkit. Logits have the shape (N, C): N samples, C
classes. ``z_p`` are those of the full-precision network P and ``z_q`` those of its quantized copy Q.
Entropies and losses are in nats. float16 and bfloat16 arguments are computed in float32, float32 and float64
arguments in their own precision.
"""

from adadfq_plugin.functional.distillation import feature_loss, kl_divergence_loss, quantized_loss
from adadfq_plugin.functional.game import (
    agreement_loss,
    balance_loss,
    disagreement_information,
    disagreement_loss,
    generator_loss,
    margin_loss,
    normalized_information,
)
from adadfq_plugin.functional.images import (
    bn_statistics_loss,
    channel_moments,
    head_similarity,
    patch_similarity_entropy,
    squared_norm,
    total_variation,
)
from adadfq_plugin.functional.metrics import sqnr_db, top1_accuracy, top1_agreement
from adadfq_plugin.functional.rounding import compensated_weights, rounding_shift

__all__ = [
    "agreement_loss",
    "balance_loss",
    "bn_statistics_loss",
    "channel_moments",
    "compensated_weights",
    "disagreement_information",
    "disagreement_loss",
    "feature_loss",
    "generator_loss",
    "head_similarity",
    "kl_divergence_loss",
    "margin_loss",
    "normalized_information",
    "patch_similarity_entropy",
    "quantized_loss",
    "rounding_shift",
    "sqnr_db",
    "squared_norm",
    "top1_accuracy",
    "top1_agreement",
    "total_variation",
]
