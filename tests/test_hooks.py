"""Every context manager inside, after, after an exception and nested; and the guard that watches all tests."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adadfq_plugin.captures import capture_calls, capture_inputs, capture_outputs
from adadfq_plugin.hooks import fork_rng, module_modes


class StopTestError(Exception):
    """Raised inside a block to leave it early."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act: nn.Module = nn.ReLU()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(self.bn(self.conv(x))))  # type: ignore[no-any-return]


def net() -> Net:
    with fork_rng(0):
        return Net()


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Scale(nn.Module):
    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor


@pytest.mark.usefixtures("seeded")
class TestCaptureInputs:
    def test_inside(self) -> None:
        model, x = net(), images()
        with capture_inputs({"first": model.conv, "second": model.bn}) as inputs:
            assert inputs == {}
            model(x)
            assert list(inputs) == ["first", "second"]
            assert inputs["first"] is x
            assert torch.equal(inputs["second"], model.conv(x))

    def test_every_forward_replaces_the_last(self) -> None:
        model = Scale()
        with capture_inputs({"scale": model}) as inputs:
            for value in (1.0, 2.0):
                model(torch.tensor(value))
                assert inputs["scale"].item() == value

    def test_gradient_reaches_the_images(self) -> None:
        model, x = net(), images().requires_grad_()
        with capture_inputs({"bn": model.bn}) as inputs:
            model(x)
        (gradient,) = torch.autograd.grad(inputs["bn"].square().sum(), x)
        assert gradient.abs().sum() > 0

    def test_pairs_and_keywords(self) -> None:
        model = nn.ModuleDict({"a": Scale(), "b": Scale()})
        with capture_inputs(model.named_children()) as inputs:
            model["a"](x=torch.tensor(3.0))
            model["b"](torch.tensor(4.0), factor=5.0)
        assert {name: value.item() for name, value in inputs.items()} == {"a": 3.0, "b": 4.0}

    def test_hooks_are_released(self) -> None:
        model = net()
        with pytest.raises(StopTestError), capture_inputs(model.named_modules()) as inputs:
            raise StopTestError
        model(images())
        assert inputs == {}
        assert [name for name, module in model.named_modules() if module._forward_pre_hooks] == []

    def test_nested(self) -> None:
        model = Scale()
        with capture_inputs({"outer": model}) as outer:
            with capture_inputs({"inner": model}) as inner:
                model(torch.tensor(1.0))
            model(torch.tensor(2.0))
        assert (outer["outer"].item(), inner["inner"].item()) == (2.0, 1.0)

    def test_wrong_module_leaves_no_hook(self) -> None:
        model = net()
        pairs = [("conv", model.conv), ("not", 3)]
        with pytest.raises(TypeError, match=r"modules\['not'\] must be a torch.nn.Module; got int"):
            capture_inputs(pairs).__enter__()  # type: ignore[arg-type]
        assert not model.conv._forward_pre_hooks

    def test_input_must_be_a_tensor(self) -> None:
        model = Scale()
        with (
            capture_inputs({"scale": model}),
            pytest.raises(TypeError, match="the first input of 'scale' must be a tensor; got float"),
        ):
            model(1.0)


class TestCaptureOutputs:
    def test_inside_after_and_nested(self) -> None:
        model = Scale()
        with capture_outputs({"outer": model}) as outer:
            with capture_outputs({"inner": model}) as inner:
                first = model(torch.tensor(1.0))
            second = model(torch.tensor(2.0))
        model(torch.tensor(3.0))
        assert (outer["outer"], inner["inner"]) == (second, first)

    def test_after_an_exception(self) -> None:
        model = Scale()
        with pytest.raises(StopTestError), capture_outputs({"scale": model}):
            raise StopTestError
        assert not model._forward_hooks


@pytest.mark.usefixtures("seeded")
class TestCaptureCalls:
    @pytest.fixture
    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(2), nn.LayerNorm(4))

    def test_calls_of_the_latest_pass_in_their_order(self, model: nn.Sequential) -> None:
        first, second = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 4, 4, requires_grad=True)
        with capture_calls(model, {"layer_norm", "group_norm"}) as calls:
            model(first)
            output = model(second)
            torch.layer_norm(first, [4])  # beside the model
            assert [call.name for call in calls] == ["group_norm", "layer_norm"]
            assert calls[1].output is output
            assert calls[0].argument(1, "num_groups") == 2
            assert calls[0].argument(9, "missing", 7) == 7
            (gradient,) = torch.autograd.grad(calls[0].output.sum(), second)
        assert gradient.shape == second.shape
        model(first)
        assert calls[1].output is output  # not watched any more
        assert not model._forward_pre_hooks
        assert not model._forward_hooks

    def test_keyword_arguments(self) -> None:
        class Keyword(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.softmax(x, dim=1)

        with capture_calls(Keyword(), {"softmax"}) as calls:
            pass
        assert calls == []
        network = Keyword()
        with capture_calls(network, {"softmax"}) as calls:
            network(torch.randn(2, 3))
        assert calls[0].argument(1, "dim") == 1

    def test_a_pass_that_fails_leaves_nothing_behind(self, model: nn.Sequential) -> None:
        with capture_calls(model, {"layer_norm"}) as calls:
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 4, 4, 4))
            torch.layer_norm(torch.randn(2, 4), [4])
            assert calls == []
        assert torch.overrides._get_current_function_mode() is None

    def test_nested(self, model: nn.Sequential) -> None:
        with capture_calls(model, {"layer_norm"}) as outer, capture_calls(model[3], {"layer_norm"}) as inner:
            model(torch.randn(2, 3, 4, 4))
        assert len(outer) == len(inner) == 1
        assert outer[0].output is inner[0].output


class KeepsItsDropoutOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def train(self, mode: bool = True) -> KeepsItsDropoutOff:
        super().train(mode)
        self.drop.eval()
        return self


class RefusesTrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Dropout()

    def train(self, mode: bool = True) -> RefusesTrain:
        self.child.train(mode)
        raise NotImplementedError("no train()")


def flags(module: nn.Module) -> list[bool]:
    return [submodule.training for submodule in module.modules()]


class TestModuleModes:
    @pytest.mark.parametrize("training", [True, False])
    def test_mixture_of_modes_comes_back(self, training: bool) -> None:
        model = net()
        model.bn.eval()
        before = flags(model)
        with module_modes(model, training):
            assert flags(model) == [training] * 5
        assert flags(model) == before
        with pytest.raises(StopTestError), module_modes(model, training):
            raise StopTestError
        assert flags(model) == before

    def test_nested(self) -> None:
        model = net()
        with module_modes(model, False):
            with module_modes(model.bn, True):
                assert flags(model) == [False, False, True, False, False]
            assert flags(model) == [False] * 5
        assert flags(model) == [True] * 5

    def test_shared_submodule_keeps_its_own_flag(self) -> None:
        shared = nn.Dropout()
        model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared).eval())
        shared.train()
        before = flags(model)
        with module_modes(model, False):
            assert flags(model) == [False] * 4
        assert flags(model) == before == [True, True, True, False]

    def test_override_is_asked(self) -> None:
        model = KeepsItsDropoutOff()
        with module_modes(model, True):
            assert flags(model) == [True, False]
        assert flags(model) == [True, True]

    def test_refusal_half_way_is_undone(self) -> None:
        model = RefusesTrain()
        with pytest.raises(NotImplementedError, match=r"no train\(\)"):
            module_modes(model, False).__enter__()
        assert flags(model) == [True, True]

    def test_what_holds_a_graph_of_torch_export_changes_around_it(self) -> None:
        graph = torch.export.export(nn.Sequential(nn.Dropout()), (torch.ones(4),)).module()
        first, last = nn.Dropout(), nn.Dropout()
        model = nn.Sequential(first, nn.Sequential(graph, last))
        before = flags(model)
        with module_modes(model, False):
            assert flags(first) == flags(last) == [False]
            assert flags(graph) == before[3:-1]
        assert flags(model) == before

    def test_graphs_of_torch_export_stay_as_they_are(self) -> None:
        graph = torch.export.export(nn.Sequential(nn.Dropout()), (torch.ones(4),)).module()
        before = flags(graph)
        with module_modes(graph, True), module_modes(graph, False):
            assert flags(graph) == before
        assert flags(graph) == before


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def draw_and_stop() -> None:
    draw()
    raise StopTestError


class TestForkRng:
    def test_seed_decides_what_is_drawn(self) -> None:
        drawn = []
        for seed in (1, 1, 2):
            with fork_rng(seed):
                drawn.append(draw())
        assert drawn[0] == drawn[1]
        assert [a == b for a, b in zip(drawn[0], drawn[2], strict=True)] == [False] * 3

    def test_outer_streams_go_on(self) -> None:
        with fork_rng(5):
            expected = [draw(), draw(), draw()]
        with fork_rng(5):
            first = draw()
            with fork_rng(6):
                with fork_rng(7):
                    draw()
                draw()
            second = draw()
            with pytest.raises(StopTestError), fork_rng(8):
                draw_and_stop()
            third = draw()
        assert [first, second, third] == expected

    def test_seeding_inside_does_not_leak(self) -> None:
        # The autouse guard compares the states around this test.
        with fork_rng(3):
            torch.manual_seed(11)
            random.seed(12)
            np.random.seed(13)

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_seed_out_of_range(self, seed: int) -> None:
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\); got"):
            fork_rng(seed).__enter__()

    def test_largest_seed(self) -> None:
        with fork_rng(2**64 - 1):
            assert draw() != draw()

    @pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
    def test_cuda_generator_of_that_device_only(
        self, device: str, index: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        before = [generator.get_state() for generator in generators]
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "default_generators", generators)
        with fork_rng(9, device):
            assert [generator.initial_seed() for generator in generators] == (
                [9, 2] if index == 0 else [1, 9]
            )
            torch.rand(4, generator=generators[index])
        for generator, state in zip(generators, before, strict=True):
            assert torch.equal(generator.get_state(), state)

    def test_mps_generator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
        monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: generator)
        with fork_rng(9, torch.device("mps")):
            assert generator.initial_seed() == 9
        assert torch.equal(generator.get_state(), before)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_real_cuda(self) -> None:
        drawn = []
        before = torch.cuda.get_rng_state()
        for _ in range(2):
            with fork_rng(4, "cuda"):
                drawn.append(torch.rand(3, device="cuda"))
        assert torch.equal(*drawn)
        assert torch.equal(torch.cuda.get_rng_state(), before)


OTHER_ENGINE = """
engines = torch.backends.quantized
engines.engine = next(e for e in engines.supported_engines if e not in ("none", engines.engine))
"""

LEAKS = {
    "torch grad mode": "torch.set_grad_enabled(False)",
    "torch default dtype": "torch.set_default_dtype(torch.float64)",
    "torch default device": "torch.set_default_device('meta')",
    "torch thread count": "torch.set_num_threads(2)",
    "torch deterministic mode": "torch.use_deterministic_algorithms(True)",
    "torch quantized engine": OTHER_ENGINE,
    "torch global module hooks": "torch.nn.modules.module.register_module_forward_hook(print)",
    "torch random state": "torch.rand(1)",
    "python random state": "random.random()",
    "numpy random state": "np.random.rand()",
    "os.environ": "os.environ['LEFT_BEHIND'] = '1'",
    "working directory": "os.chdir('/')",
    "sys.path": "sys.path.append('/left/behind')",
    "matplotlib figures": "pyplot.figure()",
    "running thread: sleeper": "threading.Thread(target=time.sleep, args=(3,), name='sleeper').start()",
}

LEAKY_TESTS = """
import os, random, sys, threading, time
import matplotlib
matplotlib.use("agg")
from matplotlib import pyplot
import numpy as np
import pytest
import torch

@pytest.mark.parametrize("leak", {leaks!r})
def test_leak(leak):
    exec(leak, globals())

def test_clean(seeded, monkeypatch, tmp_path):
    torch.rand(1), random.random(), np.random.rand()
    monkeypatch.setenv("LEFT_BEHIND", "1")
    monkeypatch.chdir(tmp_path)
    assert torch.get_num_threads() == 1
"""


def test_the_guard_catches_every_leak(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    (tmp_path / "test_leaky.py").write_text(LEAKY_TESTS.format(leaks=list(LEAKS.values())))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "-c", os.devnull],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(here.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    # Each leak is an error of its own test alone: the guard has put the state back for the next one.
    reports = run.stdout.split("ERROR at teardown of ")[1:]
    caught = [report.split("the test leaks\n")[1].split("\n")[0].partition(":")[0] for report in reports]
    assert caught == [name.partition(":")[0] for name in LEAKS], run.stdout + run.stderr
    assert f"{len(LEAKS) + 1} passed, {len(LEAKS)} errors" in run.stdout
    assert run.stdout.count("`seeded` fixture") >= 3


def test_calls_are_not_recorded_after_an_interrupt() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Interrupted()
    with pytest.raises(KeyboardInterrupt), capture_calls(model, {"softmax"}) as calls:
        model(torch.ones(1, 2))
    torch.ones(2).softmax(0)
    assert not calls
