"""The facts of a run as plain values: what the report says, before it is put into words."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.facts import Facts
from adadfq_plugin.history import History

__all__ = ["Accuracy", "Latency", "Report", "environment", "measure_latency"]


def _installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


_PACKAGES = ("adadfq_plugin", "torch", "torchao", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on labelled images that played no part in the quantization.

    Args:
        top1: fractions by network: ``float``, ``fake-quantized``, ``converted``.
        count: how many images.
        images: where they lie.
        classes: how their sub-folders were matched with the network's classes.
    """

    top1: Mapping[str, float]
    count: int
    images: str
    classes: str

    def standard_error(self, network: str) -> float:
        """Of the fraction, over draws of as many images (binomial)."""
        top1 = self.top1[network]
        return math.sqrt(top1 * (1 - top1) / self.count)


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image, by network: the median over ``rounds`` turns, side by side."""

    milliseconds: Mapping[str, float]
    threads: int
    rounds: int


@dataclass(frozen=True)
class Report:
    """All that is known when a run has ended; what wasn't measured is None.

    Args:
        name: the network, as the user called it.
        method: calibration method.
        backend: toolkit.
        scheme: bits and engine; None for a model that the user prepared.
        settings: settings of the method, the given ones.
        seed: seed of the run.
        minutes: time limit of the calibration, None for a fixed number of steps.
        samples: the synthetic set, with the facts of the network's input.
        history: losses by phase.
        seconds: duration by phase.
        agreement: share of the synthetic set on which float and fake-quantized network agree in top-1.
        fidelity: share of the synthetic set on which fake-quantized and converted network agree in top-1.
        integer_share: share of the multiply-adds that integer kernels do in the converted network.
        sqnr_db: ratio of the float logits to their quantization error on the synthetic set, in decibel.
        information: normalised disagreement information H' of each sample (N,).
        boundaries: lambda_l and lambda_u, for the methods that have them.
        notes: what was decided and why.
        warnings: what the user should look at.
        accuracy: top-1 on labelled images.
        sizes: bytes on disk, by network: ``float``, ``converted``.
        latency: time for one image.
        environment: versions and machine, see :func:`environment`.
        crop_mode: how labelled images are cropped, timm's names.
        network: what else the user said of the network.
    """

    name: str
    method: str
    backend: str
    scheme: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    seed: int
    samples: SyntheticDataset
    minutes: float | None = None
    history: History = field(default_factory=History)
    seconds: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    fidelity: float | None = None
    integer_share: float | None = None
    sqnr_db: float | None = None
    information: Tensor | None = None
    boundaries: tuple[float, float] | None = None
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    accuracy: Accuracy | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    latency: Latency | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    crop_mode: str = "center"
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> Facts:
        """What is known of the network's input and output."""
        return self.samples.facts

    @property
    def bits(self) -> str:
        """``W4A8``, or nothing if the user prepared the model."""
        return "" if self.scheme is None else "W{weight_bits}A{activation_bits}".format(**self.scheme)

    def shares(self) -> dict[str, float] | None:
        """The fractions of the samples below, between and above the two boundaries."""
        if self.information is None or self.boundaries is None or not len(self.information):
            return None
        low, high = self.boundaries
        below, above = self.information < low, self.information > high
        shares = {
            "below": below,
            "between": (low <= self.information) & (self.information <= high),
            "above": above,
        }
        return {where: each.double().mean().item() for where, each in shares.items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything but the images, as JSON holds it; NaN and infinity become None."""
        values = {
            "name": self.name,
            "network": self.network,
            "method": self.method,
            "backend": self.backend,
            "bits": self.bits,
            "scheme": self.scheme,
            "settings": self.settings,
            "seed": self.seed,
            "minutes": self.minutes,
            "facts": asdict(self.facts),
            "crop_mode": self.crop_mode,
            "guesses": self.facts.guesses,
            "samples": len(self.samples),
            "agreement": self.agreement,
            "fidelity": self.fidelity,
            "integer_share": self.integer_share,
            "sqnr_db": self.sqnr_db,
            "boundaries": self.boundaries,
            "shares": self.shares(),
            "accuracy": self._accuracy(),
            "sizes": self.sizes,
            "latency": None if self.latency is None else asdict(self.latency),
            "seconds": self.seconds,
            "notes": self.notes,
            "warnings": self.warnings,
            "environment": self.environment,
            "information": None if self.information is None else self.information.tolist(),
            "history": self.history.rows,
        }
        plain: dict[str, Any] = _plain(values)
        return plain

    def _accuracy(self) -> dict[str, Any] | None:
        if self.accuracy is None:
            return None
        errors = {network: self.accuracy.standard_error(network) for network in self.accuracy.top1}
        return {**asdict(self.accuracy), "standard_error": errors}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions and machine: what a figure depends on besides the settings.

    Args:
        device: where the calibration ran; None: on the CPU.

    Example:
        >>> sorted(environment())[:5]
        ['cpu', 'cpu_capability', 'device', 'platform', 'python']
    """
    where = torch.device(device or "cpu")
    return {
        "versions": {name: metadata.version(name) for name in _PACKAGES if _installed(name)},
        "device": f"{where} ({torch.cuda.get_device_name(where)})" if where.type == "cuda" else str(where),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": bool(torch.cpu._is_vnni_supported()),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_latency(
    networks: Mapping[str, nn.Module], example: Tensor, *, seconds: float = 10.0, rounds: int = 50
) -> Latency:
    """Median time of one forward pass, the networks taking turns so that each meets the same machine.

    Args:
        networks: by name, in eval mode.
        example: the input, one image.
        seconds: stop after the round in which this is reached.
        rounds: turns at most; the first five rounds are not counted.

    Returns:
        The figures, with the thread count and the rounds that were counted.
    """
    warmup = 5
    times: dict[str, list[float]] = {name: [] for name in networks}
    start = time.perf_counter()
    done = 0
    with torch.inference_mode():
        while done < warmup + rounds and (done <= warmup or time.perf_counter() - start < seconds):
            for name, network in networks.items():
                before = time.perf_counter()
                network(example)
                times[name].append(time.perf_counter() - before)
            done += 1
    medians = {name: 1000 * statistics.median(values[warmup:]) for name, values in times.items()}
    return Latency(medians, torch.get_num_threads(), done - warmup)
