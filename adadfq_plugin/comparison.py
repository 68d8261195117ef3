"""P, Q and what Q converts to, side by side: whether they are one network, and how far quantization moved them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adadfq_plugin.captures import capture_draws
from adadfq_plugin.contracts import Phase, Prepared
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import ModelError, first_line
from adadfq_plugin.functional import disagreement_information, normalized_information, sqnr_db, top1_agreement
from adadfq_plugin.hooks import any_algorithm
from adadfq_plugin.teacher import Teacher

__all__ = ["figures", "not_the_teacher", "refuse_inconvertible", "refuse_random", "unfaithful"]

TOLERANCE = 0.01
"""Largest difference of logits, relative to the largest one, between a network and its prepared copy."""
FAITHFUL = 0.98
"""Agreement of fake-quantized and converted network below which a user is warned."""
TRIAL = 4
"""Images of noise that both are asked for."""
RARE = 64
"""Further passes over them where random numbers are drawn: a path is dropped seldom."""
PIECE = 16
"""Images a forward pass."""


def refuse_random(teacher: Teacher) -> None:
    """Refuses a network that answers otherwise when it is asked again.

    Args:
        teacher: P.

    Raises:
        ModelError: two passes over the same images differ.
    """
    with torch.no_grad():
        _answers(teacher, teacher.noise(TRIAL))


def _answers(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a network answers, which has to be the same when it is asked again."""
    with capture_draws() as drawn:
        once = network(images)
    tolerance = TOLERANCE * float(once.abs().max())
    for _ in range(RARE if drawn else 1):
        if not torch.allclose(once, network(images), rtol=TOLERANCE, atol=tolerance, equal_nan=True):
            raise ModelError(
                "the network draws random numbers (drop path, noise) also when it only answers: call eval() on it "
                "before it is traced, or switch that off; adadfq_plugin.prepare traces it as it is in eval mode"
            )
    return once


def not_the_teacher(teacher: Teacher, prepared: Prepared, *, own: bool = False) -> str:
    """A sentence where what was prepared, before it is quantized, computes something else than the teacher.

    Args:
        teacher: P.
        prepared: Q, on the teacher's device; a copy of it is run.
        own: whether the teacher is the prepared model's own unquantized copy.

    Returns:
        the sentence, empty where the two are one network.

    Raises:
        ModelError: another number of logits, or others when it is asked again.
    """
    images = teacher.noise(TRIAL)
    twin = prepared.reference()  # the toolkit's own observers can't be told not to observe
    with torch.no_grad(), twin.phase(Phase.FLOAT):
        expected, found = teacher(images), _answers(twin.module, images)
    if found.shape != expected.shape:
        raise ModelError(
            f"for {TRIAL} images the prepared model's answers have the shape {tuple(found.shape)}, the teacher's "
            f"{tuple(expected.shape)}: prepare a copy of the teacher itself"
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


def refuse_inconvertible(teacher: Teacher, prepared: Prepared) -> None:
    """Refuses now what the toolkit's convert would refuse after the calibration.

    Args:
        teacher: P.
        prepared: Q, on the teacher's device; a copy of it is observed, converted and run.

    Raises:
        ModelError: the conversion, or the converted network, fails.
    """
    images = teacher.noise(TRIAL)
    twin = prepared.reference()
    with torch.no_grad(), any_algorithm():
        with twin.phase(Phase.OBSERVE):
            twin.module(images)
        twin.set_ranges("minmax")
        try:
            twin.convert()(images.cpu())
        except Exception as error:  # whatever the toolkit raises
            raise ModelError(
                f"the prepared model can't be converted: {first_line(error)}; let adadfq_plugin.prepare prepare it, "
                "which leaves such calls in float, or give them no QConfig"
            ) from error


def figures(
    teacher: Teacher, prepared: Prepared, samples: SyntheticDataset, device: torch.device
) -> tuple[dict[str, Any], str]:
    """How far Q is from P on samples, and what Q converts to from Q.

    Args:
        teacher: P.
        prepared: Q, calibrated.
        samples: the images.
        device: where both networks are.

    Returns:
        ``information``: normalised information of each sample (N,); ``agreement``: share of equal top-1 answers of P
        and Q; ``sqnr_db``: the logits' signal over their quantization noise; ``fidelity``: share of equal answers of Q
        and the converted network, None where Q quantizes nothing before it is converted. Then a sentence where the
        converted network is another than Q, else nothing.
    """
    of_p: list[Tensor] = []
    of_q: list[Tensor] = []
    of_c: list[Tensor] = []
    converted = prepared.convert()
    with torch.no_grad(), any_algorithm(), prepared.phase(Phase.EVALUATE):
        for start in range(0, len(samples), PIECE):
            images = samples.images(start, start + PIECE)
            of_p.append(teacher(images.to(device)).cpu())
            of_c.append(converted(images))
            if prepared.trainable:  # the toolkit's own observers quantize nothing, and would go on observing
                of_q.append(prepared.module(images.to(device)).cpu())
    z_p, z_c = torch.cat(of_p), torch.cat(of_c)
    z_q = torch.cat(of_q) if of_q else z_c
    values = {
        "information": normalized_information(disagreement_information(z_p, z_q), z_p.shape[1]),
        "agreement": top1_agreement(z_p, z_q),
        "sqnr_db": sqnr_db(z_p, z_q),
        "fidelity": top1_agreement(z_q, z_c) if of_q else None,
    }
    return values, unfaithful(z_p, z_q, z_c)


def unfaithful(z_p: Tensor, z_q: Tensor, z_c: Tensor) -> str:
    """A sentence where the converted network's logits are farther from Q's than these from P's, and answer otherwise.

    Samples are close to ties, which any change breaks: few equal answers alone say nothing.
    """
    same = top1_agreement(z_q, z_c)
    moved, strayed = (float(torch.linalg.vector_norm(one - z_q)) for one in (z_p, z_c))
    if same >= FAITHFUL or strayed <= moved:  # NaN is no fidelity
        return ""
    return (
        f"on the synthetic set the converted network agrees with the fake-quantized one on {same:.1%} alone, and its "
        f"logits are {strayed / moved if moved else math.inf:.1f} times as far from that one's as those are from the "
        "float network's: it is not the network that was calibrated"
    )
