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


def squared_norm(images: Array) -> float:
    return sum(float(pixel) ** 2 for pixel in images.flat) / images.size


def patch_similarity_entropy(tokens: Array, bandwidth: float, points: int, every: int = 1) -> Array:
    entropies = []
    for image in tokens:
        pairs = [(i, j) for i in range(len(image)) for j in range(i + 1, len(image))][::every]
        similarities = [
            float(np.dot(image[i], image[j]) / np.linalg.norm(image[i]) / np.linalg.norm(image[j]))
            for i, j in pairs
        ]
        reach = 1 + 4 * bandwidth
        step, integral = 2 * reach / (points - 1), 0.0
        for index in range(points):
            place = -reach + index * step
            density = 0.0
            for similarity in similarities:
                z = (place - similarity) / bandwidth
                density += math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / bandwidth / len(similarities)
            integral -= density * math.log(density) * step if density > 0 else 0.0
        entropies.append(integral)
    return np.array(entropies)


def head_similarity(attention: Array) -> Array:
    result = []
    for heads in attention:
        count, queries, keys = heads.shape
        values = []
        for a in range(count):
            for b in range(a + 1, count):
                for query in range(queries):
                    x, y = heads[a, query] * keys, heads[b, query] * keys
                    covariance = float(((x - x.mean()) * (y - y.mean())).mean())
                    top = (2 * x.mean() * y.mean() + 0.01**2) * (2 * covariance + 0.03**2)
                    bottom = (x.mean() ** 2 + y.mean() ** 2 + 0.01**2) * (x.var() + y.var() + 0.03**2)
                    values.append(top / bottom)
        result.append(sum(values) / len(values))
    return np.array(result)


def rounding_shift(weight: Array, rounded: Array, means: Array) -> Array:
    size = len(weight) // len(means)
    return np.array(
        [
            sum((rounded[o] - weight[o]).flat[k] * means[o // size, k] for k in range(weight[o].size))
            for o in range(len(weight))
        ]
    )


def compensated_weights(
    weight: Array, step: Array, lower: Array, upper: Array, moments: Array, damping: float
) -> Array:
    """The same rounding with the inverse written down: a weight's row and column leave it when it is rounded."""
    result = np.empty_like(weight)
    for group, moment in enumerate(moments):
        size = np.diag(moment)
        damped = moment + np.diag(np.where(size <= 1e-12 * size.max(), 1.0, 0.0) + damping * size.mean())
        for output, row in enumerate(weight[group]):
            s, w, inverse = step[group, output], row.copy(), np.linalg.inv(damped)
            for j in np.argsort(-size, kind="stable"):
                value = min(max(w[j], lower[group, output]), upper[group, output])
                result[group, output, j] = value
                error = (w[j] - np.round(value / s) * s) / inverse[j, j]
                w = w - error * inverse[:, j]
                inverse = inverse - np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return result
