r"""What trained networks say about images: statistics and similarities that real ones have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adadfq_plugin.functional._checks import like, shape_of, upcast

__all__ = [
    "bn_statistics_loss",
    "channel_moments",
    "head_similarity",
    "patch_similarity_entropy",
    "squared_norm",
    "total_variation",
]


C1, C2 = 0.01**2, 0.03**2
"""Constants of SSIM: shares of the range, squared."""


class _ChannelMoments(torch.autograd.Function):
    """Mean and variance by sums along the memory, and a backward of one pass: a sixth of ``var_mean``'s time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        if x.is_contiguous():
            rows = x.view(x.shape[0], x.shape[1], -1)
            mean = rows.sum(2).sum(0) / count
            second = torch.linalg.vector_norm(rows, dim=2).square().sum(0) / count
        else:
            columns = x.movedim(1, -1).reshape(-1, x.shape[1])
            ones = columns.new_ones(len(columns))
            mean, second = ones @ columns / count, ones @ columns.square() / count
        ctx.save_for_backward(x, mean)
        return mean, (second - mean.square()).clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        for_mean, for_var = grads
        x, mean = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        slope = for_var * (2 / (x.numel() // x.shape[1]))
        offset = for_mean / (x.numel() // x.shape[1]) - slope * mean
        return torch.addcmul(offset.view(shape), x, slope.view(shape))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance of every channel over batch and positions.

    .. math:: \mu_c = \frac{1}{M} \sum_i x_{ic}, \qquad \sigma_c^2 = \frac{1}{M} \sum_i x_{ic}^2 - \mu_c^2

    Args:
        x: Activations of shape (N, C, ...).

    Returns:
        Mean and variance, each (C,).

    Raises:
        ValueError: ``x`` has fewer than two dimensions or no elements.

    Example:
        >>> import torch
        >>> channel_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        (tensor([2., 0.]), tensor([1., 0.]))

    Source: the batch statistics of Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1.
    """
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x must have the shape (N, C, ...) and elements; got {shape_of(x)}")
    moments: tuple[Tensor, Tensor] = _ChannelMoments.apply(upcast("x", x))
    return moments


def bn_statistics_loss(
    batch_means: Sequence[Tensor],
    batch_vars: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
) -> Tensor:
    r"""Distance of a batch's statistics from those that the BatchNorm layers of P have stored.

    .. math::

        L_{BNS} = \frac{1}{L} \sum_{l=1}^{L} \frac{1}{C_l} \left(
            \lVert \mu_l - \hat\mu_l \rVert_2^2 + \lVert \sigma_l^2 - \hat\sigma_l^2 \rVert_2^2 \right)

    :math:`\mu_l, \sigma_l^2` are mean and biased variance of the inputs of layer l over batch and positions;
    :math:`\hat\mu_l, \hat\sigma_l^2` are the layer's running mean and running variance. Layers weigh the
    same, whatever their number of channels.

    Args:
        batch_means: One tensor of shape (C_l,) for each of L >= 1 layers, in the units of the activations.
        batch_vars: One tensor of shape (C_l,) per layer, biased, in those units squared.
        running_means: One tensor of shape (C_l,) per layer.
        running_vars: One tensor of shape (C_l,) per layer.

    Returns:
        The mean over layers, a tensor of shape ().

    Raises:
        ValueError: There is no layer, the sequences differ in length, or a shape or a dtype does not fit.

    Example:
        >>> import torch
        >>> zeros, ones = torch.zeros(2), torch.ones(2)
        >>> bn_statistics_loss([ones], [3 * ones], [zeros], [ones])  # 1 + 4
        tensor(5.)
        >>> bn_statistics_loss([ones, zeros], [3 * ones, ones], [zeros, zeros], [ones, ones])  # (5 + 0) / 2
        tensor(2.5000)

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    if not len(batch_means):
        raise ValueError("batch_means must hold at least one layer; got none")
    others = {"batch_vars": batch_vars, "running_means": running_means, "running_vars": running_vars}
    for name, values in others.items():
        if len(values) != len(batch_means):
            raise ValueError(
                f"{name} must hold as many layers as batch_means, {len(batch_means)}; got {len(values)}"
            )
    layers = []
    for layer, mean in enumerate(batch_means):
        where = f"batch_means[{layer}]"
        mean = upcast(where, mean)
        if mean.ndim != 1 or not len(mean):
            raise ValueError(f"{where} must have the shape (C,) with C >= 1; got {shape_of(mean)}")
        layers.append(
            (mean, *(like(f"{name}[{layer}]", values[layer], where, mean) for name, values in others.items()))
        )
    means, variances, of_means, of_variances = map(torch.cat, zip(*layers, strict=True))
    distances = (means - of_means).square() + (variances - of_variances).square()
    return torch.stack([each.mean() for each in distances.split([len(mean) for mean, *_ in layers])]).mean()


def total_variation(images: Tensor) -> Tensor:
    r"""Mean absolute difference of vertical neighbours plus that of horizontal neighbours.

    .. math::

        TV = \frac{1}{N C (H - 1) W} \sum_{n,c,i,j} |x_{n,c,i+1,j} - x_{n,c,i,j}|
           + \frac{1}{N C H (W - 1)} \sum_{n,c,i,j} |x_{n,c,i,j+1} - x_{n,c,i,j}|

    Args:
        images: Images, shape (N, C, H, W), N, C >= 1 and H, W >= 2.

    Returns:
        The sum of both means in the units of the pixels, a tensor of shape ().

    Raises:
        ValueError: The shape or the dtype does not fit.

    Example:
        >>> import torch
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [4.0, 5.0]]]]))  # 4 down, 1 to the right
        tensor(5.)

    Source: Rudin et al., "Nonlinear total variation based noise removal algorithms", Physica D, 1992; this is
    its anisotropic form, divided by the numbers of pairs.
    """
    images = upcast("images", images)
    if images.ndim != 4 or not images.numel() or min(images.shape[2:]) < 2:
        raise ValueError(f"images must have the shape (N, C, H, W) with H, W >= 2; got {shape_of(images)}")
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def squared_norm(images: Tensor) -> Tensor:
    r"""Mean squared pixel, in the network's normalised units.

    .. math:: R = \frac{1}{N C H W} \sum_{n,c,i,j} x_{n,c,i,j}^2

    Args:
        images: Images, shape (N, C, H, W), with at least one element.

    Returns:
        The mean in the units of the pixels squared, a tensor of shape ().

    Raises:
        ValueError: The shape or the dtype does not fit.

    Example:
        >>> import torch
        >>> squared_norm(torch.tensor([[[[1.0, -3.0]]]]))
        tensor(5.)

    Source: the image regulariser of Mordvintsev et al., "Inceptionism", 2015, as in Yin et al., "Dreaming to
    Distill", CVPR 2020, arXiv 1912.08795, equation 3, divided by the number of pixels.
    """
    images = upcast("images", images)
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"images must have the shape (N, C, H, W) and elements; got {shape_of(images)}")
    return images.square().mean()


def patch_similarity_entropy(
    tokens: Tensor, *, bandwidth: float = 0.05, points: int = 48, pairs: int = 512
) -> Tensor:
    r"""Differential entropy of the cosine similarities between an image's patches.

    .. math::

        \Gamma_{ij} = \frac{u_i \cdot u_j}{\lVert u_i \rVert \lVert u_j \rVert}, \quad
        f(x) = \frac{1}{K h} \sum_{i<j} \varphi\Big(\frac{x - \Gamma_{ij}}{h}\Big), \quad
        H = -\int f(x) \ln f(x) \, dx

    :math:`\varphi` is the standard normal density and the sum runs over K pairs: all of them, or every so many-th
    where there are more than ``pairs``. The integral is a sum over ``points`` places on [-1 - 4 h, 1 + 4 h]. Noise is
    alike everywhere, so its similarities crowd; an object in front of something spreads them.

    Args:
        tokens: Features of the patches, shape (N, T, D) with T >= 2.
        bandwidth: Width h of the kernel, in units of cosine similarity, finite and > 0.
        points: Places of the integral, at least 2.
        pairs: Most pairs taken from an image, at least 1.

    Returns:
        The entropy of each image in nats, a tensor of shape (N,); the entropy of a density, so it may be negative.

    Raises:
        ValueError: A shape, a dtype or a number does not fit.

    Example:
        >>> import torch
        >>> alike = patch_similarity_entropy(torch.ones(1, 4, 2))  # of a normal density: (1 + ln 2 pi) / 2 + ln h
        >>> round(alike.item(), 3)
        -1.577

    Source: Li et al., "Patch Similarity Aware Data-Free Quantization for Vision Transformers", ECCV 2022, arXiv
    2203.02250, section 3.2.
    """
    tokens = upcast("tokens", tokens)
    if tokens.ndim != 3 or not tokens.numel() or tokens.shape[1] < 2:
        raise ValueError(f"tokens must have the shape (N, T, D) with T >= 2; got {shape_of(tokens)}")
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth must be finite and positive; got {bandwidth}")
    if points < 2 or pairs < 1:
        raise ValueError(f"points must be at least 2 and pairs at least 1; got {points} and {pairs}")
    i, j = (each.to(tokens.device) for each in _some_pairs(tokens.shape[1], pairs))
    units = F.normalize(tokens, dim=2)
    similarity = (units[:, i] * units[:, j]).sum(2)
    reach = 1 + 4 * bandwidth
    places = torch.linspace(-reach, reach, points, dtype=tokens.dtype, device=tokens.device)
    kernel = ((places - similarity[:, :, None]) / bandwidth).square().mul(-0.5).exp()
    density = kernel.mean(1) / (bandwidth * math.sqrt(2 * math.pi))
    smallest = torch.finfo(density.dtype).tiny
    return -(density * density.clamp_min(smallest).log()).sum(1) * (2 * reach / (points - 1))


def _some_pairs(count: int, most: int) -> tuple[Tensor, Tensor]:
    """Pairs i < j of so many, row by row: all, or every so many-th; never all at a time, which are half the square."""
    first = torch.arange(count - 1)
    starts = first * (2 * count - first - 1) // 2  # ranks of the pairs (i, i + 1)
    total = count * (count - 1) // 2
    ranks = torch.arange(0, total, -(-total // most))
    i = torch.searchsorted(starts, ranks, right=True) - 1
    return i, ranks - starts[i] + i + 1


def head_similarity(attention: Tensor) -> Tensor:
    r"""Structural similarity of the attention maps of different heads, over all pairs of heads.

    .. math::

        \frac{2}{h (h - 1)} \sum_{a<b} \mathrm{SSIM}(A_a, A_b), \quad \mathrm{SSIM}(a, b) =
        \frac{(2 \mu_a \mu_b + c_1)(2 \sigma_{ab} + c_2)}
        {(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)}

    Each map is what one query attends to, in units of even attention, with one window over the whole map;
    :math:`c_1 = 0.01^2`, :math:`c_2 = 0.03^2`. On real images heads look at the same objects.

    Args:
        attention: Probabilities, shape (N, h, T, S) with h >= 2 heads, T queries and S keys.

    Returns:
        The mean over pairs of heads and queries for each image, without unit, in [-1, 1], a tensor of shape (N,).

    Raises:
        ValueError: The shape or the dtype does not fit.

    Example:
        >>> import torch
        >>> head_similarity(torch.tensor([0.9, 0.1]).expand(1, 2, 1, 2))
        tensor([1.])

    Source: Choi et al., "MimiQ", AAAI 2025, arXiv 2407.20021, inter-head attention similarity; SSIM of Wang et al.,
    "Image quality assessment", IEEE TIP 2004, equation 13.
    """
    attention = upcast("attention", attention)
    if attention.ndim != 4 or not attention.numel() or attention.shape[1] < 2:
        raise ValueError(f"attention must have the shape (N, h, T, S) with h >= 2; got {shape_of(attention)}")
    maps = attention * attention.shape[3]
    mean = maps.mean(3, keepdim=True)
    centred = maps - mean
    variance = centred.square().mean(3)
    mean = mean.squeeze(3)
    a, b = torch.triu_indices(maps.shape[1], maps.shape[1], 1, device=maps.device)
    covariance = (centred[:, a] * centred[:, b]).mean(3)
    likeness = (2 * mean[:, a] * mean[:, b] + C1) / (mean[:, a].square() + mean[:, b].square() + C1)
    structure = (2 * covariance + C2) / (variance[:, a] + variance[:, b] + C2)
    return (likeness * structure).mean((1, 2))
