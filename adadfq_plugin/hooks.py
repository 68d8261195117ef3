"""Temporary changes that always come back: after the block, after an exception in it, and nested."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

__all__ = [
    "any_algorithm",
    "fork_rng",
    "kept_buffers",
    "module_modes",
    "plain_tensors",
    "unfrozen",
]


_ONE_THREAD = threading.RLock()


@contextmanager
def module_modes(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module and all its submodules into train or eval mode; give each its own flag back afterwards.

    ``module.train(training)`` does the first, so a module that overrides ``train`` (a frozen BatchNorm, say)
    is asked. The flags are put back one by one, so a mixture of modes survives. A graph of ``torch.export``
    refuses to change its mode, which is part of the graph; it stays as it is.

    Args:
        module: The root of the tree.
        training: True for train mode, False for eval mode.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
        >>> with module_modes(net, training=False):
        ...     [m.training for m in net.modules()]
        [False, False, False]
        >>> [m.training for m in net.modules()]
        [True, True, False]
    """
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        _set_mode(module, training)
        yield
    finally:
        for submodule, flag in flags:
            submodule.training = flag


def _set_mode(module: nn.Module, training: bool) -> None:
    try:
        module.train(training)
    except NotImplementedError:
        if isinstance(module, GraphModule):
            return
        if not any(isinstance(each, GraphModule) for each in module.modules()):
            raise
        module.training = training
        for child in module.children():
            _set_mode(child, training)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Give a module its buffers back after it was run: some count how often, or keep what they have seen.

    Fake quantizers that learn keep what they have seen in parameters, which they get back as well.

    Args:
        module: The root of the tree.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with kept_buffers(norm):
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.num_batches_tracked.item(), norm.running_mean.tolist()
        (0, [0.0, 0.0])
    """
    plain = [each for each in module.modules() if not isinstance(each, torch.jit.ScriptModule)]
    tables: list[dict[str, Any]] = [each._buffers for each in plain]
    tables += [each._parameters for each in plain if "fake_quant_enabled" in each._buffers]
    before = [(table, dict(table)) for table in tables]
    values = {kept: kept.detach().clone() for _, own in before for kept in own.values() if kept is not None}
    try:
        yield
    finally:
        for own, kept in before:
            own.update(kept)
        with torch.no_grad():
            for kept, value in values.items():
                if kept.shape != value.shape:  # observers learn the number of channels from what they see
                    kept.resize_(value.shape)
                if not torch.equal(kept, value):
                    kept.copy_(value)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors are of float32 and on the CPU unless something else is said, and stay what they are.

    Whatever ``torch.set_default_device``, ``torch.set_default_dtype`` and ``torch.autocast`` were told. These belong to
    the process, as the global generators do, so that one thread at a time gets in.

    Example:
        >>> import torch
        >>> with torch.device("meta"), torch.autocast("cpu"), plain_tensors():
        ...     (torch.zeros(1, 1) @ torch.zeros(1, 1)).device, torch.is_autocast_enabled("cpu")
        (device(type='cpu'), False)
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE_THREAD)
        dtype = torch.get_default_dtype()
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def any_algorithm() -> Iterator[None]:
    """Let integer networks run, whatever ``torch.use_deterministic_algorithms`` was told: they have no such kernels.

    Example:
        >>> import torch
        >>> torch.use_deterministic_algorithms(True)
        >>> with any_algorithm():
        ...     torch.are_deterministic_algorithms_enabled()
        False
        >>> torch.are_deterministic_algorithms_enabled()
        True
        >>> torch.use_deterministic_algorithms(False)
    """
    asked = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warn_only)


@contextmanager
def unfrozen(model: nn.Module) -> Iterator[None]:
    """Every parameter asks for gradients where none does, as in a network that was frozen for inference.

    Parameters that were frozen one by one stay so. The flags of before come back.

    Args:
        model: The network.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2).requires_grad_(False)
        >>> with unfrozen(layer):
        ...     layer.weight.requires_grad
        True
        >>> layer.weight.requires_grad
        False
    """
    parameters = [each for each in model.parameters() if each.is_floating_point()]
    if any(each.requires_grad for each in parameters):
        parameters = []
    try:
        for each in parameters:
            each.requires_grad_(True)
        yield
    finally:
        for each in parameters:
            each.requires_grad_(False)


@contextmanager
def fork_rng(seed: int, *devices: torch.device | str) -> Iterator[None]:
    """Draw from freshly seeded global generators; leave the caller's random streams as if nothing was drawn.

    Seeded, and restored afterwards, are torch's CPU generator, those of ``devices`` that are accelerators,
    :mod:`random` and ``numpy.random``. Generators of other accelerators are not touched.

    Args:
        seed: Any integer in [0, 2**64); NumPy gets its lower 32 bits.
        *devices: Devices whose generators take part beside the CPU's: ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Yields:
        Nothing.

    Raises:
        ValueError: The seed is out of range.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with fork_rng(0):
        ...     first = torch.rand(3)
        >>> with fork_rng(0):
        ...     second = torch.rand(3)
        >>> torch.equal(first, second), torch.equal(before, torch.get_rng_state())
        (True, True)
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64); got {seed}")
    generators = [torch.default_generator]
    for device in map(torch.device, devices):
        if device.type == "cuda":
            # Asked for in any case: this starts CUDA, and before that there are no generators.
            current = torch.cuda.current_device()
            generators.append(
                torch.cuda.default_generators[current if device.index is None else device.index]
            )
        elif device.type == "mps":
            generators.append(torch.mps._get_default_mps_generator())
    torch_states = [generator.get_state() for generator in generators]
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # Not torch.manual_seed, which would reseed every accelerator in the process.
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        for generator, state in zip(generators, torch_states, strict=True):
            generator.set_state(state)
        random.setstate(random_state)
        np.random.set_state(numpy_state)
