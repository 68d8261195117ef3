"""What every test gets: a guard that fails it when it leaks, seeded randomness on request, the assets."""

from __future__ import annotations

import copy
import functools
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import torch

from adadfq_plugin.hooks import fork_rng

# Examples are the same in every run, so a red gate can be reproduced; a shared machine makes deadlines useless.
hypothesis.settings.register_profile(
    "adadfq", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("adadfq")

THREAD_GRACE_S = 1.0


class Watched(NamedTuple):
    """A piece of process-wide state: how to read it as a comparable value, and how to put it back."""

    read: Callable[[], Any]
    restore: Callable[[Any], object]
    hint: str = ""


def _environment() -> dict[str, str]:
    # torch's compiler notes its cache folder at the first step of any optimiser
    passing = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in passing}


def _set_environment(values: dict[str, str]) -> None:
    for name in _environment().keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return (name, np.asarray(keys).tobytes(), *rest)


def _set_numpy_state(state: tuple[Any, ...]) -> None:
    name, keys, *rest = state
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))


def _global_hooks() -> dict[str, Any]:
    module = vars(torch.nn.modules.module)
    return {name: dict(value) for name, value in module.items() if _is_hook_table(name, value)}


def _set_global_hooks(tables: dict[str, Any]) -> None:
    for name, table in tables.items():
        live = getattr(torch.nn.modules.module, name)
        live.clear()
        live.update(table)


def _is_hook_table(name: str, value: object) -> bool:
    return name.startswith("_global_") and isinstance(value, dict)


def _figures() -> list[int]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return [] if pyplot is None else list(pyplot.get_fignums())


def _close_figures(kept: list[int]) -> None:
    for number in set(_figures()) - set(kept):
        sys.modules["matplotlib.pyplot"].close(number)


def _set_quantized_engine(engine: str) -> None:
    torch.backends.quantized.engine = engine


_SEED = "ask for the `seeded` fixture or draw from a generator of your own"

WATCHED = {
    "torch grad mode": Watched(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch default dtype": Watched(torch.get_default_dtype, torch.set_default_dtype),
    "torch default device": Watched(torch.get_default_device, torch.set_default_device),
    "torch thread count": Watched(torch.get_num_threads, torch.set_num_threads),
    "torch deterministic mode": Watched(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    "torch quantized engine": Watched(lambda: torch.backends.quantized.engine, _set_quantized_engine),
    "torch global module hooks": Watched(_global_hooks, _set_global_hooks),
    "torch random state": Watched(
        lambda: torch.get_rng_state().numpy().tobytes(),
        lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
        _SEED,
    ),
    "python random state": Watched(random.getstate, random.setstate, _SEED),
    "numpy random state": Watched(_numpy_state, _set_numpy_state, _SEED),
    "os.environ": Watched(_environment, _set_environment),
    "working directory": Watched(os.getcwd, os.chdir),
    "sys.path": Watched(lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path)),
    "matplotlib figures": Watched(_figures, _close_figures),
}


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        return f"changed {sorted(changed)}"
    if isinstance(before, list):
        return f"added {[x for x in after if x not in before]}, lost {[x for x in before if x not in after]}"
    return f"{before!r} became {after!r}"


def _left_threads(before: list[threading.Thread]) -> list[threading.Thread]:
    # A _DummyThread is a foreign one, of autograd for instance, that Python has only met and can't end.
    new = [t for t in threading.enumerate() if t not in before and not isinstance(t, threading._DummyThread)]
    # torch.export runs an interpreter whose progress bar, though never shown, keeps a daemon for good.
    new = [t for t in new if t.name != "tqdm_monitor"]
    deadline = time.monotonic() + THREAD_GRACE_S
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in new if thread.is_alive()]


PATTERNS = "torchao.quantization.pt2e.qat_utils", "_get_aten_graph_module_for_pattern"


def _exporting_once(export: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    @functools.wraps(export)
    def exported(pattern: Any, example: Any, is_cuda: bool = False, **arguments: Any) -> Any:
        function = getattr(pattern, "fn", None)
        if arguments or function is None:
            return export(pattern, example, is_cuda, **arguments)
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        key = function.__code__, tuple(map(str, cells)), is_cuda
        if key not in known:
            known[key] = export(pattern, example, is_cuda)
        return copy.deepcopy(known[key])

    return exported


@pytest.fixture(autouse=True)
def patterns_are_exported_once() -> None:
    """torchao exports twelve patterns at each ``prepare_qat_pt2e``, always the same: 7 of its 9 seconds here."""
    module, name = sys.modules.get(PATTERNS[0]), PATTERNS[1]
    export = getattr(module, name, None)
    if export is not None and not hasattr(export, "__wrapped__"):
        setattr(module, name, _exporting_once(export))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves process-wide state changed, and puts the state back for the next one."""
    before = {name: watched.read() for name, watched in WATCHED.items()}
    threads = threading.enumerate()
    yield
    leaks = []
    for name, watched in WATCHED.items():
        after = watched.read()
        if after != before[name]:
            watched.restore(before[name])
            leaks.append(f"{name}: {watched.hint or _difference(before[name], after)}")
    leaks += [f"running thread: {thread.name}" for thread in _left_threads(threads)]
    if leaks:
        pytest.fail("the test leaks\n" + "\n".join(leaks), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> Iterator[None]:
    """One torch thread: results do not depend on the machine, and parallel sessions do not fight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seeded() -> Iterator[None]:
    """Global generators of torch, random and NumPy seeded with 0, and restored after the test."""
    with fork_rng(0):
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of trained networks and evaluation images; tests that need it are skipped without it."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "assets"
    folder = Path(os.environ.get("ADADFQ_ASSETS", default)).resolve()
    if not folder.is_dir():
        pytest.skip("no assets: set ADADFQ_ASSETS to their folder")
    return folder
