"""P and Q side by side: whether they are one network before anything is quantized, and how far apart afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adadfq_plugin.contracts import Phase, Prepared
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import ModelError
from adadfq_plugin.functional import disagreement_information, normalized_information, sqnr_db, top1_agreement
from adadfq_plugin.teacher import Teacher

__all__ = ["figures", "not_the_teacher", "refuse_random"]

TOLERANCE = 0.01
"""Largest difference of logits, relative to the largest one, between a network and its prepared copy."""
PIECE = 16
"""Images a forward pass."""


def refuse_random(teacher: Teacher, device: torch.device) -> None:
    """Refuses a network that answers otherwise when it is asked again.

    Args:
        teacher: P.
        device: where it is.

    Raises:
        ModelError: two passes over the same images differ.
    """
    images = _noise(teacher, device)
    with torch.no_grad():
        once, again = teacher(images), teacher(images)
    if not torch.allclose(
        once, again, rtol=TOLERANCE, atol=TOLERANCE * float(once.abs().max()), equal_nan=True
    ):
        raise ModelError(
            "the network draws random numbers (drop path, noise) also when it only answers: call eval() on it before "
            "it is traced, or switch that off; adadfq_plugin.prepare traces the network as it is in eval mode"
        )


def not_the_teacher(teacher: Teacher, prepared: Prepared, device: torch.device, *, own: bool = False) -> str:
    """A sentence where what was prepared, before it is quantized, computes something else than the teacher.

    Args:
        teacher: P.
        prepared: Q; a copy of it is run.
        device: where both are.
        own: whether the teacher is the prepared model's own unquantized copy.

    Returns:
        the sentence, empty where the two are one network.

    Raises:
        ModelError: another number of logits.
    """
    images = _noise(teacher, device)
    twin = prepared.reference()  # the toolkit's own observers can't be told not to observe
    with torch.no_grad(), twin.phase(Phase.FLOAT):
        expected, found = teacher(images), twin.module(images)
    if found.shape != expected.shape:
        raise ModelError(
            f"the prepared model gives {found.shape[-1]} logits, the teacher {expected.shape[-1]}: prepare a copy of "
            "the teacher itself"
        )
    least = torch.finfo(torch.float).tiny
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(least))
    if error <= TOLERANCE:
        return ""
    if own:
        return (
            f"before anything is quantized the prepared model's logits differ by {error:.1%} from those of its own "
            "unquantized copy: some call may write into a part of a tensor that is read again; pass teacher="
        )
    return (
        f"the prepared model is not the teacher: before anything is quantized its logits differ by {error:.1%}. "
        "It was trained since, or copied from another network, or torchao has given its BatchNorm layers another "
        "epsilon (1e-5 in quantization-aware layers)"
    )


def _noise(teacher: Teacher, device: torch.device) -> Tensor:
    noise = torch.randn(4, *teacher.facts.input_size, generator=torch.Generator().manual_seed(0))
    return teacher.facts.from_standard(noise).to(device)


def figures(
    teacher: Teacher, prepared: Prepared, samples: SyntheticDataset, device: torch.device
) -> dict[str, Any]:
    """How far Q is from P on samples.

    Args:
        teacher: P.
        prepared: Q, calibrated.
        samples: the images.
        device: where both networks are.

    Returns:
        ``information``: normalised information of each sample (N,); ``agreement``: share of equal top-1 answers;
        ``sqnr_db``: the logits' signal over their quantization noise.
    """
    z_p: list[Tensor] = []
    z_q: list[Tensor] = []
    network, place = prepared.module, device
    if not prepared.trainable:  # the toolkit's own observers quantize nothing, and would go on observing
        network, place = prepared.convert(), torch.device("cpu")
    with torch.no_grad(), prepared.phase(Phase.EVALUATE):
        for start in range(0, len(samples), PIECE):
            images = samples.images(start, start + PIECE)
            z_p.append(teacher(images.to(device)).cpu())
            z_q.append(network(images.to(place)).cpu())
    p, q = torch.cat(z_p), torch.cat(z_q)
    return {
        "information": normalized_information(disagreement_information(p, q), p.shape[1]),
        "agreement": top1_agreement(p, q),
        "sqnr_db": sqnr_db(p, q),
    }
