"""Random images with structure of every scale, in place of synthetic ones: for networks whose weights are random."""

from __future__ import annotations

from networks import random_images

from adadfq_plugin.methods.noise import Noise

__all__ = ["RandomImages"]


class RandomImages(Noise):
    """As `noise`, of images with structure; networks of random weights have nothing that others could imitate."""

    name = "random_images"
    summary = "random images with structure of every scale, for benchmarks of untrained networks"
    draw = staticmethod(random_images)
