"""Plain float64 NumPy twins of ``adadfq_plugin.functional``, written from the equations, one term at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def entropy(probabilities: Array) -> float:
    return -sum(float(p) * math.log(p) for p in probabilities if p > 0)


def one_hot(y: npt.NDArray[np.int64], classes: int) -> Array:
    return np.eye(classes)[y]


def cross_entropy(logits: Array, targets: Array) -> float:
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        total += -float(np.dot(target, np.log(softmax(row))))
    return total / len(logits)


def disagreement_loss(z_p: Array, z_q: Array, targets: Array) -> float:
    return cross_entropy(z_p - z_q, targets)


def agreement_loss(z_p: Array, z_q: Array, targets: Array) -> float:
    return cross_entropy(z_p + z_q, targets)


def balance_loss(z_p: Array, z_q: Array, targets: Array, alpha_ds: float, alpha_as: float) -> float:
    return alpha_ds * cross_entropy(z_p - z_q, targets) + alpha_as * cross_entropy(z_p + z_q, targets)


def disagreement_information(z_p: Array, z_q: Array) -> Array:
    return np.array([entropy(softmax(p - q)) for p, q in zip(z_p, z_q, strict=True)])


def normalized_information(information: Array, classes: int, minimum: float | None = None) -> Array:
    low = min(information) if minimum is None else minimum
    return np.array([(h - low) / (math.log(classes) - low) for h in information])


def margin_loss(normalized: Array, lower: float, upper: float) -> float:
    below = [max(lower - float(h), 0.0) for h in normalized]
    above = [max(float(h) - upper, 0.0) for h in normalized]
    return sum(below) / len(below) + sum(above) / len(above)


def bn_statistics_loss(
    means: Sequence[Array],
    variances: Sequence[Array],
    running_means: Sequence[Array],
    running_vars: Sequence[Array],
) -> float:
    total = 0.0
    for mean, var, mean_p, var_p in zip(means, variances, running_means, running_vars, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(mean, mean_p, strict=True)]
        squares += [(a - b) ** 2 for a, b in zip(var, var_p, strict=True)]
        total += float(sum(squares)) / len(mean)
    return total / len(means)


def generator_loss(margin: float, balance: float, bns: float, beta: float, gamma: float) -> float:
    return margin + beta * balance + gamma * bns


def quantized_loss(z_p: Array, z_q: Array, temperature: float) -> float:
    information = [entropy(softmax((p - q) / temperature)) for p, q in zip(z_p, z_q, strict=True)]
    return -temperature * temperature * sum(information) / len(information)


def kl_divergence_loss(z_p: Array, z_q: Array, temperature: float) -> float:
    total = 0.0
    for row_p, row_q in zip(z_p, z_q, strict=True):
        p, q = softmax(row_p / temperature), softmax(row_q / temperature)
        total += sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature * temperature * total / len(z_p)


def feature_loss(features_p: Sequence[Array], features_q: Sequence[Array]) -> float:
    total = 0.0
    for p, q in zip(features_p, features_q, strict=True):
        middle = float(p.sum()) / p.size
        signal = sum((float(value) - middle) ** 2 for value in p.flat)
        noise = sum((float(a) - float(b)) ** 2 for a, b in zip(p.flat, q.flat, strict=True))
        total += noise / signal if signal else 0.0
    return total / len(features_p)


def total_variation(images: Array) -> float:
    down = np.abs(images[:, :, 1:, :] - images[:, :, :-1, :])
    right = np.abs(images[:, :, :, 1:] - images[:, :, :, :-1])
    return float(down.sum() / down.size + right.sum() / right.size)


def top1_accuracy(logits: Array, labels: npt.NDArray[np.int64]) -> float:
    right = [int(np.argmax(row)) == int(label) for row, label in zip(logits, labels, strict=True)]
    return sum(right) / len(right)


def top1_agreement(a: Array, b: Array) -> float:
    equal = [int(np.argmax(x)) == int(np.argmax(y)) for x, y in zip(a, b, strict=True)]
    return sum(equal) / len(equal)


def sqnr_db(reference: Array, approximation: Array) -> float:
    noise = reference - approximation
    return 10 * math.log10(float((reference**2).sum()) / float((noise**2).sum()))
