"""Methods, quantizers, backends, flags and threads of others: driven by the contract, kept, or refused by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import models
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    QConfig,
    QConfigMapping,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import adadfq_plugin
from adadfq_plugin import api, choice
from adadfq_plugin.config import GeneratorSettings, Scheme, Settings
from adadfq_plugin.contracts import Outcome, Phase, Task
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import BrokenPluginError, ModelError, SettingsError
from adadfq_plugin.facts import find_facts
from adadfq_plugin.game.run import Run
from adadfq_plugin.registry import Registry
from adadfq_plugin.teacher import make_teacher

pytestmark = pytest.mark.usefixtures("seeded")
QUICK: dict[str, Any] = {
    "samples": 16, "batch_size": 8, "steps": 3, "range_samples": 16,
}  # fmt: skip
QUICK_G: dict[str, Any] = {
    **QUICK, "warmup_steps": 3, "refine_steps": 3, "latent_dim": 8, "generator_width": 16,
}  # fmt: skip
TOLD: dict[str, Any] = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3}
EXAMPLE = (torch.zeros(2, *models.SIZE),)


def task(settings: Settings, prepared: Any = None) -> Task:
    """What a tool hands to a method when it keeps to the contract, and knows nothing of ``calibrate``."""
    teacher = make_teacher(models.trained(), find_facts(models.trained(), **TOLD))
    opened = api.backends().get("fx").open(models.prepared() if prepared is None else prepared)
    return Task(teacher, opened, settings, 0, torch.device("cpu"), lambda *_: None)


class Faulty:
    """A method that sets ranges from noise, and then does what it is made with."""

    name, summary, settings = "faulty", "for tests", Settings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, harm: Callable[[Task], Any]) -> None:
        self.harm = harm

    def calibrate(self, task: Task) -> Any:
        run = Run(task)
        run.fill(lambda: run.answered(task.teacher.noise(8)))
        run.observe()
        outcome = run.outcome(self.name)
        harmed = self.harm(task)
        return outcome if harmed is None else harmed


def _nan(task: Task) -> None:
    with torch.no_grad():
        task.prepared.weights()[0].view(-1)[0] = torch.nan


def _change_the_teacher(task: Task) -> None:
    with torch.no_grad():
        next(task.teacher.model.parameters()).mul_(2)


def _hook(task: Task) -> None:
    task.prepared.module.register_forward_hook(lambda *_: None)


def _double(task: Task) -> None:
    task.prepared.module.double()


def _few(task: Task) -> Outcome:
    images, labels = task.teacher.noise(5), torch.zeros(5, dtype=torch.int64)
    return Outcome(SyntheticDataset(images, labels, task.teacher.facts))


def _a_sentence(task: Task) -> Outcome:
    images, labels = task.teacher.noise(16), torch.zeros(16, dtype=torch.int64)
    return Outcome(SyntheticDataset(images, labels, task.teacher.facts), notes="all well")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_nan, "left weights that are none: 'conv1.weight' holds NaN"),
        (_change_the_teacher, "changed the teacher"),
        (_hook, "left hooks on the prepared model"),
        (_double, "left can't be converted"),
        (_few, "returned 5 samples, not 16"),
        (_a_sentence, "notes or warnings that are no lists"),
        (lambda _: Outcome([]), r"returned samples of list"),  # type: ignore[arg-type]
    ],
)
def test_what_a_method_must_not_leave_is_refused(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[[Task], Any], said: str
) -> None:
    registry: Registry[Any] = api.methods()
    monkeypatch.setattr(registry, "get", lambda _name: Faulty(harm))
    prepared, teacher = models.prepared(), models.trained()
    before = models.state(prepared), models.state(teacher)
    with pytest.raises(BrokenPluginError, match=f"method 'faulty'.* {said}"):
        adadfq_plugin.calibrate(
            prepared, teacher=teacher, method="faulty", settings={"samples": 16, "steps": 0}, **TOLD
        )
    assert models.same(before[0], models.state(prepared))
    assert models.same(before[1], models.state(teacher))
    assert not prepared._forward_hooks


@pytest.mark.parametrize("method", ["adadfq", "bn_stats", "noise"])
def test_the_task_decides_all_randomness(method: str) -> None:
    chosen = api.methods().get(method)
    settings = chosen.settings(**(QUICK if method == "noise" else QUICK_G))
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            given = task(settings)
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(chosen.calibrate(given).samples.pixels)
            assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*found)


def test_phases_of_a_run_say_what_they_need() -> None:
    run = Run(task(Settings(**QUICK)))
    with pytest.raises(SettingsError, match="a generator needs GeneratorSettings, not Settings"):
        run.player()
    with pytest.raises(ValueError, match="come after fill"):
        run.observe()
    run = Run(task(GeneratorSettings(**QUICK_G)))
    player = run.player()
    run.make_samples(player)
    run.observe()
    with pytest.raises(SettingsError, match="a game with a generator needs AdaDFQSettings"):
        run.play(player)


# -- observers and quantizers of others ------------------------------------------------------------


def _observers(kind: type[nn.Module]) -> QConfigMapping:
    activation: Any = kind
    weight = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    return QConfigMapping().set_global(QConfig(activation=activation, weight=weight))


@pytest.mark.parametrize("kind", [MinMaxObserver, HistogramObserver, MovingAverageMinMaxObserver])
@pytest.mark.filterwarnings("ignore:must run observer")
def test_toolkits_observers_see_what_the_phase_says(kind: type[nn.Module]) -> None:
    """Whatever their owner, or an earlier phase, has shown them."""
    images = models.images(16)

    def ranges(*shown: tuple[Phase, Tensor], before: Tensor | None = None) -> dict[str, Tensor]:
        prepared = prepare_fx(models.trained(), _observers(kind), EXAMPLE)
        if before is not None:
            prepared(before)
        opened = api.backends().get("fx").open(prepared)
        for phase, batch in shown:
            with torch.no_grad(), opened.phase(phase):
                opened.module(batch)
        return {name: value for name, value in opened.module.state_dict().items() if "_val" in name}

    once = ranges((Phase.OBSERVE, images))
    assert len(once) > 6
    assert all(value.isfinite().all() for value in once.values())
    others = (
        ranges((Phase.OBSERVE, images), before=9 * images),
        ranges((Phase.OBSERVE, 9 * images), (Phase.OBSERVE, images)),
        ranges((Phase.OBSERVE, images), (Phase.FLOAT, 9 * images), (Phase.EVALUATE, 9 * images)),
    )
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in once.items())


class PowerOfTwo(FakeQuantize):
    """Scales for a processor that only shifts."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scale, zero_point = self.activation_post_process.calculate_qparams()
        return 2 ** torch.ceil(torch.log2(scale)), zero_point


class SameRules(FakeQuantize):
    """Another name alone."""


@pytest.mark.parametrize("kind", [PowerOfTwo, SameRules])
def test_quantizers_with_rules_of_their_own_stay(kind: type[FakeQuantize]) -> None:
    activation = kind.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=127, dtype=torch.quint8
    )
    weight: Any = get_default_qat_qconfig_mapping("x86").global_qconfig.weight  # type: ignore[union-attr]
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    prepared: Any = prepare_qat_fx(models.trained().train(), mapping, EXAMPLE)
    result = adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD)
    notes = [note for note in result.notes if "quantizers of the model's own stay (PowerOfTwo)" in note]
    assert len(notes) == (kind is PowerOfTwo)
    converted: Any = convert_fx(prepared.eval())
    shifts = [
        bool(torch.tensor(module.scale).log2().frac() == 0)
        for module in converted.modules()
        if "quantized" in type(module).__module__ and hasattr(module, "scale")
    ]
    assert len(shifts) > 2
    assert all(shifts) == (kind is PowerOfTwo)
    batch = models.images(64)
    with torch.no_grad():
        same = (prepared(batch).argmax(1) == converted(batch).argmax(1)).float().mean()
    assert same >= 0.95
    assert result.agreement > 0.8


# -- backends of others ----------------------------------------------------------------------------


class Raising:
    """A backend that fails in its own ways."""

    def recognises(self, model: nn.Module) -> bool:
        return False

    def prepare(self, *_: Any) -> nn.Module:
        raise ValueError("raw from the toolkit")


class Drawn(nn.Module):
    """What no backend takes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.trained()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y if y.sum().item() > 1e9 else 2 * y


def test_why_others_backends_fail_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, names, get = choice.backends(), choice.backends().names(), choice.backends().get

    def found(name: str) -> Any:
        if name == "broken":
            raise BrokenPluginError(
                "the backend 'broken' of other-toolkit 1.0 can't be loaded: no such package"
            )
        return Raising() if name == "raising" else get(name)

    monkeypatch.setattr(registry, "names", lambda: (*names, "broken", "raising"))
    monkeypatch.setattr(registry, "get", found)
    with pytest.raises(ModelError, match=r"not prepared.*'broken' could not be asked: .*no such package"):
        adadfq_plugin.calibrate(models.trained(), settings=QUICK_G, **TOLD)
    with pytest.raises(ModelError, match=r"fx: .*item.*; raising: ValueError: raw from the toolkit"):
        adadfq_plugin.prepare(Drawn(), 16, backend="auto")


# -- the process's own state -----------------------------------------------------------------------


def test_threads_take_turns() -> None:
    """The default dtype and the global generators are the process's."""
    alone = adadfq_plugin.calibrate(models.prepared(), settings=QUICK_G, **TOLD).samples.pixels
    prepared = [models.prepared() for _ in range(3)]
    found: list[Tensor] = []

    def work(model: nn.Module) -> None:
        found.append(adadfq_plugin.calibrate(model, settings=QUICK_G, **TOLD).samples.pixels)

    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=work, args=(model,)) for model in prepared]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()
    assert len(found) == 3
    assert all(torch.equal(pixels, alone) for pixels in found)


def test_deterministic_algorithms_leave_no_layer_in_float() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        result = adadfq_plugin.quantize(models.trained(), settings=QUICK_G, backend="fx", **TOLD)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        adadfq_plugin.calibrate(models.prepared(), settings=QUICK_G, **TOLD)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.integer_macs == result.macs


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_weights_lie_as_they_lay(layout: torch.memory_format) -> None:
    mapping = get_default_qat_qconfig_mapping("x86")
    prepared: Any = prepare_qat_fx(models.trained().to(memory_format=layout).train(), mapping, EXAMPLE)
    adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD)
    assert prepared.conv3.weight.is_contiguous(memory_format=layout)


def test_networks_without_values_or_graph_are_refused() -> None:
    with pytest.raises(ModelError, match="on the device 'meta'"):
        adadfq_plugin.quantize(models.trained().to("meta"), **TOLD)
    with pytest.raises(ModelError, match="on the device 'meta'"):
        adadfq_plugin.calibrate(models.prepared(), teacher=models.trained().to("meta"), **TOLD)
    with pytest.raises(SettingsError, match="device 'meta' can't be used"):
        adadfq_plugin.calibrate(models.prepared(), device="meta", **TOLD)
    prepared = models.prepared()
    with pytest.raises(ModelError, match="teacher= is the prepared model itself"):
        adadfq_plugin.calibrate(prepared, teacher=prepared, **TOLD)
    with pytest.raises(ModelError, match="several inputs"):
        adadfq_plugin.calibrate(
            models.prepared(), example_inputs=2 * EXAMPLE, mean=(0.5,) * 3, std=(0.5,) * 3
        )


class Gated(nn.Module):
    """Takes more than images."""

    def __init__(self) -> None:
        super().__init__()
        self.network = models.trained()

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return cast(Tensor, self.network(x)) * gate


def test_a_network_that_takes_more_than_images_is_told_what_to_do() -> None:
    mapping = adadfq_plugin.qconfig_mapping(Scheme())
    prepared = prepare_qat_fx(Gated().train(), mapping, (*EXAMPLE, torch.ones(1)))
    words = r"doesn't take images alone \(missing a required argument: 'gate'\): wrap it"
    for size in (None, 16):
        with pytest.raises(ModelError, match=words):
            adadfq_plugin.quantize(Gated().eval(), input_size=size)
        with pytest.raises(ModelError, match=words):
            adadfq_plugin.calibrate(prepared, input_size=size)
    for example, kind in ((2 * EXAMPLE, "2 of them"), (torch.zeros(3, 4), r"a tensor of shape \(3, 4\)")):
        with pytest.raises(ModelError, match=rf"or a tuple of one, not {kind};"):
            adadfq_plugin.calibrate(prepared, example_inputs=example)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_as_a_teacher() -> None:
    scripted = torch.jit.trace(copy.deepcopy(models.trained()), EXAMPLE)
    with pytest.raises(ModelError, match=r"TorchScript.*pass the network it was made of"):
        adadfq_plugin.calibrate(models.prepared(), teacher=scripted, **TOLD)


def test_a_mapping_takes_widths_by_name() -> None:
    for given in ({"weight_bits": 4}, Scheme(weight_bits=4)):
        assert adadfq_plugin.qconfig_mapping(given).global_qconfig.weight().bits == 4  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match="weight_bits = 1"):
        adadfq_plugin.qconfig_mapping({"weight_bits": 1})
