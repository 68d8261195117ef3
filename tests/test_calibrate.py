"""calibrate, quantize, evaluate: in place, repeatable, and harmless when anything fails."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import models
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import adadfq_plugin
from adadfq_plugin import api, choice, comparison
from adadfq_plugin.config import AdaDFQSettings, Scheme, Settings
from adadfq_plugin.contracts import Method
from adadfq_plugin.errors import AdaDFQError, BrokenPluginError, ModelError, SettingsError, UnknownNameError
from adadfq_plugin.facts import find_facts
from adadfq_plugin.teacher import refuse_nan

pytestmark = pytest.mark.usefixtures("seeded")
QUICK: dict[str, Any] = {
    "samples": 24, "batch_size": 8, "steps": 6, "range_samples": 16,
}  # fmt: skip
LENGTHS = ("warmup_steps", "refine_steps", "steps")
QUICK_G: dict[str, Any] = {
    **QUICK, "warmup_steps": 6, "refine_steps": 6, "latent_dim": 8, "generator_width": 16,
}  # fmt: skip
TOLD: dict[str, Any] = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3}


def quick(method: str) -> dict[str, Any]:
    return QUICK if method == "noise" else QUICK_G


def test_training_that_does_harm_is_taken_back() -> None:
    reckless = {**QUICK_G, "learning_rate": 300.0}
    results = {
        keep: adadfq_plugin.calibrate(models.prepared(4), settings={**reckless, "keep_best": keep}, **TOLD)
        for keep in (True, False)
    }
    told = [note for note in results[True].notes if "Q is left as it was after 0 of 6 steps" in note]
    assert len(told) == 1
    assert results[True].sqnr_db > results[False].sqnr_db + 3
    assert len(results[True].history.column("game", "held_out")[0]) == 6
    assert not results[False].history.column("game", "held_out")[0]


@pytest.mark.parametrize("method", ["adadfq", "bn_stats", "noise"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_three_lines(method: str, bits: int) -> None:
    prepared = models.prepared(bits)
    result = adadfq_plugin.calibrate(prepared, method=method, settings=quick(method), **TOLD)
    quantized = convert_fx(prepared.eval())
    batch = models.images(64)
    with torch.no_grad():
        fake, integer = prepared(batch), quantized(batch)
    assert (fake.argmax(1) == integer.argmax(1)).float().mean() >= 0.98
    assert result.prepared is prepared
    assert (result.method, result.backend, result.seed) == (method, "fx", 0)
    assert len(result.samples) == 24
    assert result.information.shape == (24,)
    assert ((result.information >= -1e-6) & (result.information <= 1 + 1e-6)).all()
    assert 0 <= result.agreement <= 1
    expected = ("game",) if method == "noise" else ("warmup", "samples", "game")
    assert result.history.phases() == expected
    assert not result.warnings
    assert isinstance(api.methods().get(method), Method)


def test_adadfq_plays_and_its_baseline_does_not() -> None:
    played = adadfq_plugin.calibrate(models.prepared(4), settings=QUICK_G, **TOLD)
    alone = adadfq_plugin.calibrate(models.prepared(4), method="bn_stats", settings=QUICK_G, **TOLD)
    assert set(played.history.figures("game")) >= {"margin", "balance", "prior", "information", "loss"}
    assert alone.history.figures("game") == ("loss", "held_out")


@pytest.mark.parametrize(
    ("more", "last"), [({}, 8), ({"replay": False, "batch_size": 12}, 10), ({"schedule": "stages"}, 10)]
)
def test_no_batch_joins_the_pool_that_q_would_hardly_learn_from(more: dict[str, Any], last: int) -> None:
    settings = {**QUICK_G, "steps": 10, "generator_interval": 1, **more}
    history = adadfq_plugin.calibrate(models.prepared(4), settings=settings, **TOLD).history
    assert history.column("game", "margin")[0] == list(range(1, last + 1))
    assert history.column("game", "loss")[0] == list(range(1, 11))


def test_the_teacher_comes_back_as_it_was() -> None:
    teacher = models.trained()
    teacher.conv1.weight.requires_grad_(False)
    teacher.train()
    teacher.bn1.eval()
    before = models.state(teacher)
    adadfq_plugin.calibrate(models.prepared(4), teacher=teacher, settings=QUICK_G, **TOLD)
    assert models.same(before, models.state(teacher))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())


def test_a_teacher_that_was_not_prepared_is_warned_of() -> None:
    other = models.trained()
    with torch.no_grad():
        other.linear.weight.mul_(1.1)
    with pytest.warns(UserWarning, match=r"the prepared model is not the teacher.*differ by \d+\.\d%"):
        result = adadfq_plugin.calibrate(models.prepared(), teacher=other, settings=QUICK_G, **TOLD)
    assert "not the teacher" in result.warnings[0]


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"answers have the shape \(4, 5\), the teacher's \(4, 7\): prepare a copy"
    ):
        adadfq_plugin.calibrate(
            models.prepared(), teacher=models.trained(classes=7), settings=QUICK_G, **TOLD
        )


def test_auto_is_the_backend_that_recognises_the_model() -> None:
    result = adadfq_plugin.calibrate(models.prepared(), backend="auto", settings=QUICK_G, **TOLD)
    assert result.backend == "fx"


def test_modes_and_frozen_weights_of_the_prepared_model_are_kept() -> None:
    prepared = models.prepared(8)
    prepared.train()
    adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD)
    assert prepared.training
    assert prepared.conv1.training
    frozen = models.prepared(8)
    frozen.linear.weight.requires_grad_(False)
    before = frozen.linear.weight.clone()
    adadfq_plugin.calibrate(frozen, settings=QUICK_G, **TOLD)
    limit = before.abs().amax() / 100  # the weights may be clipped to their last level
    assert (frozen.linear.weight - before).abs().max() <= limit


def test_other_backends_are_asked_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a stranger claims or raises."""

    class Stranger:
        def recognises(self, model: nn.Module) -> bool:
            raise AttributeError("no such thing in this torch")

    names, get = choice.backends().names(), choice.backends().get
    monkeypatch.setattr(choice.backends(), "names", lambda: ("aimet", *names))
    monkeypatch.setattr(choice.backends(), "get", lambda name: Stranger() if name == "aimet" else get(name))
    assert choice.backend_of(models.prepared(), None).name == "fx"
    with pytest.raises(ModelError, match="Residual is not prepared"):
        choice.backend_of(models.trained(), None)
    facts = find_facts(models.trained(), input_size=16)
    assert choice.prepare_with(models.trained(), facts, Scheme(), None)[1].name == "fx"


@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_a_network_that_was_frozen_for_inference_is_trained_like_any_other(backend: str) -> None:
    results = []
    for frozen in (False, True):
        model = models.trained().requires_grad_(not frozen)
        scheme = {"weight_bits": 3}
        results.append(
            adadfq_plugin.quantize(model, scheme=scheme, backend=backend, settings=QUICK_G, **TOLD)
        )
        assert all(each.requires_grad is not frozen for each in model.parameters())
    assert results[0].sqnr_db == results[1].sqnr_db
    assert not results[1].warnings


@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_a_network_without_a_gradient_is_told_why(backend: str) -> None:
    class Extracted(models.Residual):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.relu(self.bn1(self.conv1(x)))
            return cast(Tensor, self.linear(self.pool(self.conv3(self.conv2(x).detach())).flatten(1)))

    model = Extracted().eval()
    cast(Tensor, model.bn1.running_mean).add_(1)
    with pytest.raises(ModelError, match=r"no gradient for the images: .*torch\.no_grad\(\)"):
        adadfq_plugin.quantize(model, backend=backend, settings=QUICK_G, **TOLD)


def test_a_prepared_model_without_a_weight_to_train_is_told() -> None:
    prepared = models.prepared(4).requires_grad_(False)
    with pytest.warns(UserWarning, match="no weight of the prepared model requires a gradient"):
        result = adadfq_plugin.calibrate(prepared, settings={**QUICK_G, "learn_step_sizes": False}, **TOLD)
    assert any("Q was not trained" in note for note in result.notes)
    assert not any(each.requires_grad for each in prepared.parameters())


def test_a_default_device_is_no_matter() -> None:
    model = models.trained()
    results = []
    for default in (torch.device("cpu"), torch.device("meta")):
        with default:
            results.append(adadfq_plugin.quantize(model, settings=QUICK_G, **TOLD))
    assert results[0].sqnr_db == results[1].sqnr_db


@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_autocast_and_a_default_dtype_are_no_matter(backend: str) -> None:
    model = models.trained()
    plain = adadfq_plugin.quantize(model, settings=QUICK_G, backend=backend, **TOLD)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = adadfq_plugin.quantize(model, settings=QUICK_G, backend=backend, **TOLD)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.sqnr_db == plain.sqnr_db


class Spread(nn.Module):
    """The deviation of each channel, or its root mean square: roots without a gradient where a channel is constant."""

    def __init__(self, *, centred: bool) -> None:
        super().__init__()
        self.centred, self.conv, self.linear = centred, nn.Conv2d(3, 8, 3), nn.Linear(8, models.CLASSES)
        with torch.no_grad():
            self.conv.weight[0] = 0
            self.conv.bias[0] = 0 if centred else -20  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) if self.centred else self.conv(x).relu()
        middle = x.mean((2, 3), keepdim=True) if self.centred else 0
        return cast(Tensor, self.linear((x - middle).square().mean((2, 3)).sqrt()))


def test_refinement_survives_gradients_that_are_not_finite() -> None:
    settings = {**QUICK_G, "refine_steps": 3}
    with pytest.warns(UserWarning, match="updates of Q were left out"):
        result = adadfq_plugin.quantize(Spread(centred=True).eval(), settings=settings, **TOLD)
    assert len(result.samples) == QUICK_G["samples"]
    assert any("updates of G were left out" in note for note in result.notes)


def test_a_training_that_did_nothing_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="updates of Q were left out.*hardly been trained"):
        result = adadfq_plugin.quantize(Spread(centred=False).eval(), settings=QUICK_G, **TOLD)
    assert any("hardly been trained" in each for each in result.warnings)


def test_random_networks_are_refused_without_a_draw() -> None:
    class Noisy(models.Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    noisy, before = Noisy().eval(), torch.get_rng_state()
    with pytest.raises(ModelError):
        adadfq_plugin.quantize(noisy, settings=QUICK_G, **TOLD)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = models.trained()
    for call in (adadfq_plugin.prepare, adadfq_plugin.quantize):
        with pytest.raises(ModelError, match="made in torch"):
            call(model, input_size=16)


def test_without_replay_q_learns_from_batches_of_the_generators() -> None:
    result = adadfq_plugin.calibrate(
        models.prepared(4), settings={**QUICK_G, "replay": False, "batch_size": 12}, **TOLD
    )
    assert any(
        "6 steps of G on 12 images each" in note and "of Q on 12 images" in note for note in result.notes
    )
    sizes = {"replay": False, "batch_size": 12, "generator_batch_size": 8}
    bad(
        {"settings": sizes},
        SettingsError,
        r"batch_size \(12\) and generator_batch_size \(8\) must be the same",
    )


def test_a_guess_of_prepare_stays_one() -> None:
    prepared = adadfq_plugin.prepare(models.trained())
    with pytest.warns(UserWarning, match=r"input_size = .*guess"):
        result = adadfq_plugin.calibrate(
            prepared, settings={**QUICK_G, "steps": 0}, mean=(0.5,) * 3, std=(0.25,) * 3
        )
    assert set(result.facts.guesses) == {"input_size"}
    told = adadfq_plugin.calibrate(
        adadfq_plugin.prepare(models.trained(), 16),
        settings={**QUICK_G, "steps": 0},
        **{**TOLD, "input_size": None},
    )
    assert told.facts.sources["input_size"] == "model"


def test_guesses_are_named_in_one_warning() -> None:
    with pytest.warns(UserWarning, match="input_size = .*guess.*mean.*guess") as caught:
        result = adadfq_plugin.calibrate(models.prepared(), settings={**QUICK_G, "steps": 0})
    assert len([each for each in caught if "not told" in str(each.message)]) == 1
    with pytest.warns(UserWarning, match="input_size = .*guess.*mean.*guess") as again:
        adadfq_plugin.quantize(models.trained(), settings={**QUICK_G, "steps": 0})
    told = [each for each in (*caught, *again) if "not told" in str(each.message)]
    assert [each.filename for each in told] == [__file__] * 2  # the caller's line, not ours
    assert set(result.facts.guesses) == {"input_size", "mean", "std"}
    assert "not told" in result.warnings[0]


def test_what_timm_left_is_used() -> None:
    prepared = models.prepared()
    prepared.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    result = adadfq_plugin.calibrate(prepared, settings={**QUICK_G, "steps": 0})
    assert result.facts.input_size == (3, 16, 16)
    assert result.facts.mean == (0.1, 0.2, 0.3)
    assert set(result.facts.sources.values()) == {"timm", "model"}


def test_example_inputs_tell_the_size() -> None:
    arguments = {**TOLD, "input_size": None, "example_inputs": (torch.zeros(1, 3, 24, 24),)}
    result = adadfq_plugin.calibrate(models.prepared(), settings={**QUICK_G, "steps": 0}, **arguments)
    assert result.samples.images(0, 2).shape == (2, 3, 24, 24)


def test_prepare_fx_models_are_observed_not_trained() -> None:
    example = (torch.zeros(2, *models.SIZE),)
    prepared = prepare_fx(models.trained(), get_default_qconfig_mapping("x86"), example)
    result = adadfq_plugin.calibrate(prepared, teacher=models.trained(), settings=QUICK_G, **TOLD)
    assert any("not trained" in note for note in result.notes)
    assert result.sqnr_db < 60  # the figures are of a quantized network
    assert result.fidelity is None  # and of no other
    batch = models.images(32)
    expected = models.trained()(batch)
    assert (convert_fx(prepared)(batch) - expected).abs().mean() < expected.std()


def test_figures_do_not_feed_the_observers(monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrated() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        example = (torch.zeros(2, *models.SIZE),)
        prepared = prepare_fx(models.trained(), get_default_qconfig_mapping("x86"), example)
        adadfq_plugin.calibrate(prepared, teacher=models.trained(), settings=QUICK_G, **TOLD)
        return {name: value for name, value in prepared.state_dict().items() if "val" in name}

    measured = calibrated()
    nothing = {"information": torch.zeros(0), "agreement": 0.0, "sqnr_db": 0.0, "fidelity": None}, ""
    monkeypatch.setattr(comparison, "figures", lambda *_: nothing)
    assert all(torch.equal(measured[name], value) for name, value in calibrated().items())
    assert len(measured) > 3


class Functional(nn.Module):
    """What torch.ao converts to something else (a scaled sum), or not at all (a computed weight without a bias)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 6)
        self.linear = nn.Linear(8, models.CLASSES)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.bn(self.conv(x)).relu()
        x = torch.add(x, x.roll(1, 3), alpha=0.1) if self.kind == "sum" else x
        x = nn.functional.conv2d(x, self.weight.tanh(), padding=1) if self.kind == "convolution" else x
        return self.linear(x.mean((2, 3)))


def prepared_by_torch(kind: str) -> tuple[nn.Module, nn.Module]:
    model = Functional(kind)
    model.train()(models.images(32))
    mapping = get_default_qat_qconfig_mapping("x86")
    return model.eval(), prepare_qat_fx(model.train(), mapping, (torch.zeros(2, *models.SIZE),))


def test_a_conversion_to_something_else_is_told() -> None:
    model, prepared = prepared_by_torch("sum")
    with pytest.warns(UserWarning, match="it is not the network that was calibrated"):
        result = adadfq_plugin.calibrate(prepared, teacher=model.eval(), settings=QUICK_G, **TOLD)
    assert result.fidelity is not None
    assert result.fidelity < 0.98
    assert [line for line in result.warnings if "converted network agrees" in line]


def test_a_conversion_that_fails_is_refused_before_any_work() -> None:
    model, prepared = prepared_by_torch("convolution")
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    seen: list[str] = []
    with pytest.raises(ModelError, match=r"can't be converted: quantized::conv2d_prepack\(\) is missing"):
        adadfq_plugin.calibrate(
            prepared, teacher=model.eval(), settings=QUICK_G, progress=lambda *_: seen.append("step"), **TOLD
        )
    assert not seen
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())


def test_logits_that_are_no_numbers_are_no_fidelity() -> None:
    logits = torch.eye(4)
    assert "agrees with the fake-quantized one on 0.0% alone" in comparison.unfaithful(
        logits + 0.1, logits, logits * torch.nan
    )
    assert not comparison.unfaithful(logits + 0.1, logits, logits)
    assert not comparison.unfaithful(logits, logits / 100, logits.roll(1) / 100)  # other answers, but near


def test_steps_zero_sets_ranges_only() -> None:
    prepared = models.prepared(8)
    result = adadfq_plugin.calibrate(prepared, settings={**QUICK_G, "steps": 0}, **TOLD)
    assert "game" not in result.history.phases()
    assert any("not trained" in note for note in result.notes)


def test_progress_sees_every_step() -> None:
    calls: list[tuple[str, int, int]] = []

    def progress(phase: str, step: int, total: int, _figures: Mapping[str, float]) -> None:
        calls.append((phase, step, total))

    adadfq_plugin.calibrate(models.prepared(), settings=QUICK_G, progress=progress, **TOLD)
    assert [call for call in calls if call[0] == "game"] == [("game", step, 6) for step in range(1, 7)]
    assert list(dict.fromkeys(call[0] for call in calls)) == [
        "warmup",
        "samples",
        "ranges",
        "rounding",
        "game",
    ]


def test_minutes_bound_the_run() -> None:
    settings = {name: value for name, value in QUICK_G.items() if name not in LENGTHS}
    result = adadfq_plugin.calibrate(models.prepared(), settings=settings, minutes=0.03, **TOLD)
    assert 0.5 < sum(result.seconds.values()) < 6
    assert len(result.history.column("game", "loss")[0]) >= 3


def test_the_papers_rates_fall_in_its_epochs() -> None:
    published = {
        "paper_cifar": [100, 200, 300],
        "paper_resnet18": [350],
        "paper_mobilenetv2": [350],
        "paper_resnet50": [150, 300],
    }
    for preset, epochs in published.items():
        settings: Any = api.method_settings(api.methods().get("adadfq"), None, preset)
        assert (settings.warmup_steps + settings.steps) == 400 * 200
        ends = [(settings.warmup_steps + stage * settings.steps) / 200 for stage in settings.stages]
        assert ends == pytest.approx(epochs, abs=0.02)
        assert settings.generator_cooling == 1


def test_a_time_limit_without_a_say_is_refused() -> None:
    prepared = models.prepared()
    before = models.state(prepared)
    with pytest.raises(SettingsError, match="minutes = 3 has no say where steps, warmup_steps are set"):
        adadfq_plugin.calibrate(prepared, preset="paper_cifar", minutes=3, **TOLD)
    assert models.same(before, models.state(prepared))


class Flat(nn.Module):
    """A plain network whose last layer takes the pixels of all channels, by a view."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, stride=4), nn.MaxPool2d(2)
        self.head = nn.Linear(4 * (((side - 3) // 4 + 1) // 2) ** 2, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x).relu())
        return cast(Tensor, self.head(x.view(x.size(0), -1)))


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_views_of_tensors_whose_channels_lie_last(backend: str, side: int) -> None:
    if backend == "pt2e":
        pytest.importorskip("torchao", reason="backend pt2e needs torchao")
    told = {**TOLD, "input_size": side}
    result = adadfq_plugin.quantize(Flat(side).eval(), backend=backend, settings=QUICK, **told)
    assert result.integer_macs == result.macs


@pytest.mark.parametrize("preset", ["paper_cifar", "paper_resnet18", "paper_mobilenetv2", "paper_resnet50"])
def test_presets_of_the_paper_run(preset: str) -> None:
    changes = {**QUICK_G, "temperature": 3.0}
    result = adadfq_plugin.calibrate(models.prepared(4), preset=preset, settings=changes, **TOLD)
    assert isinstance(result.settings, AdaDFQSettings)
    assert result.settings.loss == "information"
    assert not result.settings.replay
    assert result.settings.temperature == 3.0
    assert all("margin" in row for row in result.history.rows if row["phase"] == "game")


SCRIPT = """
import hashlib, sys, torch, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import models, adadfq_plugin
settings = dict(samples=24, batch_size=8, steps=6, range_samples=16, warmup_steps=6, refine_steps=6,
                latent_dim=8, generator_width=16)
for seed in sys.argv[2:]:
    torch.manual_seed(5)
    prepared = models.prepared(4)
    result = adadfq_plugin.calibrate(prepared, settings=settings, input_size=16, mean=(0.5,) * 3,
                                     std=(0.25,) * 3, seed=int(seed))
    digest = hashlib.sha256(result.samples.images().numpy().tobytes())
    for name, value in sorted(prepared.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    print(digest.hexdigest())
"""


def test_the_seed_decides_everything_in_any_process() -> None:
    here = str(Path(__file__).parent)

    def digests(*seeds: str) -> list[str]:
        command = [sys.executable, "-c", SCRIPT, here, *seeds]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    one, two = digests("1", "2")
    assert one != two
    assert digests("2", "1") == [two, one]


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(3)
    prepared = models.prepared()
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())
    adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD)
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == str(np.random.get_state())


def bad(
    changes: dict[str, Any], error: type[AdaDFQError], words: str, model: nn.Module | None = None
) -> None:
    """The call is refused with the words, and the prepared model stays as it was."""
    prepared = models.prepared(4) if model is None else model
    before = models.state(prepared)
    with pytest.raises(error, match=words):
        adadfq_plugin.calibrate(prepared, **{**TOLD, "settings": QUICK_G, **changes})
    assert models.same(before, models.state(prepared))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method": "adadqf"}, UnknownNameError, "'adadqf'.*adadfq"),
        ({"preset": "paper_cifr"}, UnknownNameError, "'paper_cifr', did you mean 'paper_cifar'"),
        ({"settings": {"gama": 1.0}}, UnknownNameError, "'gama', did you mean 'gamma'"),
        ({"settings": {"gamma": -1.0}}, SettingsError, "gamma = -1.0"),
        ({"settings": {"lambda_l": 0.9}}, SettingsError, "lambda_l.*below lambda_u"),
        ({"settings": Settings()}, SettingsError, "AdaDFQSettings, not Settings"),
        ({"settings": AdaDFQSettings(), "preset": "paper_cifar"}, SettingsError, "mapping of changes"),
        ({"settings": {"generator_width": 8}}, SettingsError, "generator_width = 8: .*greater than or equal to 16"),
        ({"minutes": 0}, SettingsError, "minutes = 0"),
        ({"settings": {"gamma": 0.0}}, SettingsError, "gamma = 0 leaves no prior"),
        ({"settings": {"optimizer": "sgd"}}, SettingsError, "'sgd' needs a learning_rate"),
        ({"device": "cuda:99"}, SettingsError, "device 'cuda:99' can't be used"),
        ({"device": "gpu"}, SettingsError, "device 'gpu' can't be used"),
        ({"backend": "fxx"}, UnknownNameError, "'fxx'.*fx"),
        ({"input_size": (3, 2)}, ModelError, "BatchNorm|does not take|size"),
        ({"teacher": nn.DataParallel(nn.Linear(2, 2))}, ModelError, r"DataParallel is a wrapper: .* \.module"),
        ({"input_size": (1, 16, 16)}, ModelError, r"does not take images of size \(1, 16, 16\)"),
        ({"input_size": "big"}, ModelError, "input_size 'big'"),
        ({"num_classes": 7}, ModelError, "num_classes=7, but the model's output has 5"),
        ({"mean": (0.5,)}, ModelError, "mean has 1 values for 3 channels"),
        ({"example_inputs": ()}, ModelError, "example_inputs are a batch of images"),
        ({"example_inputs": {"x": 1}}, ModelError, "example_inputs are a batch of images"),
        ({"example_inputs": torch.zeros(2, 3, 24, 24)}, ModelError, r"\(3, 24, 24\) contradict each other"),
        ({"method": object()}, UnknownNameError, "unknown method <object"),
        ({"std": (0.0, 0.1, 0.1)}, ModelError, "must be positive"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], error: type[AdaDFQError], words: str) -> None:
    if changes.get("input_size") == (3, 2):
        changes = {"input_size": (3, 0, 2)}
    bad(changes, error, words)


def test_not_prepared_and_already_converted() -> None:
    bad({}, ModelError, "Residual is not prepared: call prepare_qat_fx", models.trained())
    prepared = models.prepared()
    adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD)
    converted = convert_fx(prepared.eval())
    with pytest.raises(ModelError, match="already converted"):
        adadfq_plugin.calibrate(converted, **TOLD)


def test_no_usable_prior() -> None:
    example = (torch.zeros(2, *models.SIZE),)
    folded = prepare_fx(models.trained(), get_default_qconfig_mapping("x86"), example)
    result = adadfq_plugin.calibrate(folded, settings=QUICK_G, **TOLD)
    assert any("no BatchNorm" in note and "teacher=" in note for note in result.notes)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5))
    told = {"settings": {"patch_similarity": 1.0}}
    bad(told, ModelError, "'patch_similarity' can't be used", models.prepared(8, flat))
    fresh = models.prepared(8, models.Residual())
    bad({}, ModelError, "never trained", fresh)


def test_one_class_and_nan_weights() -> None:
    bad({}, ModelError, "one class", models.prepared(8, models.trained(classes=1)))
    broken = models.trained()
    with torch.no_grad():
        broken.conv2.weight[0, 0, 0, 0] = torch.nan
    prepared = models.prepared(8)
    before = models.state(prepared)
    with pytest.raises(ModelError, match=r"'conv2\.weight' holds NaN"):
        adadfq_plugin.calibrate(prepared, teacher=broken, settings=QUICK_G, **TOLD)
    assert models.same(before, models.state(prepared))


def test_masks_and_bounds_may_be_infinite_but_statistics_may_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    refuse_nan(model, buffers=True)
    model.get_buffer("mask")[0] = torch.nan
    with pytest.raises(ModelError, match="'mask' holds NaN"):
        refuse_nan(model, buffers=True)
    model.get_buffer("mask")[0] = 0.0
    model.get_buffer("1.running_var")[0] = torch.inf
    with pytest.raises(ModelError, match=r"'1\.running_var' holds NaN or infinite"):
        refuse_nan(model, buffers=True)


def test_nan_in_the_prepared_model_itself() -> None:
    prepared = models.prepared(8)
    with torch.no_grad():
        next(iter(prepared.parameters()))[0] = torch.nan
    with pytest.raises(ModelError, match="holds NaN"):
        adadfq_plugin.calibrate(prepared, teacher=models.trained(), settings=QUICK_G, **TOLD)


def test_rounding_that_does_harm_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(prepared: Any, *_: Any) -> None:
        for weight in prepared.weights():
            weight.data.mul_(-1)

    monkeypatch.setattr("adadfq_plugin.game.run.round_weights", harm)
    result = adadfq_plugin.calibrate(models.prepared(4), settings=QUICK_G, **TOLD)
    assert any("rounding that makes up for errors did harm" in note for note in result.notes)


@pytest.mark.filterwarnings("ignore:adadfq_plugin. the prepared model is not the teacher")
def test_a_second_calibration_is_refused_and_conversion_still_works() -> None:
    prepared = models.prepared(4)
    adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD)
    before = models.state(prepared)
    for arguments in ({}, {"teacher": models.trained(), "method": "noise"}):
        settings = QUICK if arguments else QUICK_G
        with pytest.raises(ModelError, match="calibrated before"):
            adadfq_plugin.calibrate(prepared, settings=settings, **TOLD, **arguments)
    assert models.same(before, models.state(prepared))
    convert_fx(prepared.eval())


@pytest.mark.parametrize("phase", ["warmup", "samples", "ranges", "rounding", "game"])
def test_an_interrupt_leaves_everything_as_it_was(phase: str) -> None:
    prepared, teacher = models.prepared(4), models.trained()
    before, before_teacher = models.state(prepared), models.state(teacher)
    rng = torch.get_rng_state()

    def interrupt(current: str, step: int, _total: int, _figures: Mapping[str, float]) -> None:
        if current == phase and step >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adadfq_plugin.calibrate(prepared, teacher=teacher, settings=QUICK_G, progress=interrupt, **TOLD)
    assert models.same(before, models.state(prepared))
    assert models.same(before_teacher, models.state(teacher))
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_quantize_goes_the_whole_way() -> None:
    model = models.trained()
    before = models.state(model)
    scheme = {"weight_bits": 4, "activation_bits": 8}
    result = adadfq_plugin.quantize(model, scheme=scheme, settings=QUICK_G, **TOLD)
    assert models.same(before, models.state(model))
    assert result.quantized is not None
    assert result.scheme is not None
    assert result.scheme.weight_bits == 4
    batch = models.images(16)
    with torch.no_grad():
        assert (result.prepared.eval()(batch) - result.quantized(batch)).abs().mean() < 0.1
    with pytest.raises(UnknownNameError, match="weight_bit'"):
        adadfq_plugin.quantize(model, scheme={"weight_bit": 4}, **TOLD)
    with pytest.raises(SettingsError, match="weight_bits = 9"):
        adadfq_plugin.quantize(model, scheme={"weight_bits": 9}, **TOLD)


def test_synthesize_gives_as_many_as_asked() -> None:
    settings = {key: value for key, value in QUICK_G.items() if key != "samples"}
    samples = adadfq_plugin.synthesize(models.trained(), 11, settings=settings, **TOLD)
    assert len(samples) == 11
    digest = hashlib.sha256(samples.images().numpy().tobytes()).hexdigest()
    again = adadfq_plugin.synthesize(models.trained(), 11, settings=settings, **TOLD)
    assert digest == hashlib.sha256(again.images().numpy().tobytes()).hexdigest()
    with pytest.raises(SettingsError, match="count = 0"):
        adadfq_plugin.synthesize(models.trained(), 0, **TOLD)


def test_evaluate_counts() -> None:
    model = models.trained().train()
    batch = models.images(10)
    labels = model.eval()(batch).argmax(1)
    labels[:3] = (labels[:3] + 1) % models.CLASSES
    model.train()
    seen: list[int] = []
    result = adadfq_plugin.evaluate(model, [(batch, labels)], progress=seen.append)
    assert (result.top1, result.count) == (0.7, 10)
    assert seen == [10]
    assert model.training
    with pytest.raises(SettingsError, match="no images"):
        adadfq_plugin.evaluate(model, [])
    assert (
        adadfq_plugin.evaluate(lambda x: torch.full((len(x), 5), torch.nan), [(batch, 0 * labels)]).top1 == 0
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", [(8, 1), (8, models.CLASSES), (1,)])
def test_labels_that_are_no_classes_are_refused(shape: tuple[int, ...]) -> None:
    batch, labels = models.images(8), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(SettingsError, match=r"labels of shape .* for logits of shape \(8, 5\)"):
        adadfq_plugin.evaluate(models.trained(), [(batch, labels)])
    with pytest.raises(SettingsError, match=r"float32"):
        adadfq_plugin.evaluate(models.trained(), [(batch, torch.zeros(8))])
    with pytest.raises(SettingsError, match=r"must be in \[0, 5\); got 1 to 5; .* classes, from 0"):
        adadfq_plugin.evaluate(models.trained(), [(batch[:5], torch.arange(5) + 1)])


def test_observers_learn_nothing_from_labelled_images() -> None:
    mapping = get_default_qconfig_mapping("x86")
    prepared = prepare_fx(models.trained(), mapping, (torch.zeros(2, *models.SIZE),))
    with torch.no_grad():
        prepared(models.images(16))
    fresh = prepare_fx(models.trained(), mapping, (torch.zeros(2, *models.SIZE),))
    for model in (prepared, fresh, models.prepared()):
        before = models.state(model)
        adadfq_plugin.evaluate(model, [(9 * models.images(16), torch.zeros(16, dtype=torch.int64))])
        assert models.same(before, models.state(model))


class _InPlace(models.Residual):
    """Normalises its images itself, where they are."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1
        x *= 2
        return super().forward(x)


@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_a_network_may_overwrite_its_images(backend: str) -> None:
    if backend == "pt2e":
        pytest.importorskip("torchao")
    model = _InPlace()
    model.load_state_dict(models.trained().state_dict())
    result = adadfq_plugin.quantize(model.eval(), backend=backend, settings=quick("adadfq"), **TOLD)
    assert result.fidelity is not None
    assert result.fidelity > 0.95
    assert not result.warnings


@pytest.mark.parametrize(
    ("name", "value"), [("meta", nn.Parameter(torch.ones(2))), ("pretrained_cfg", "imagenet.pth")]
)
def test_attributes_of_the_users_own_are_none_of_timms(name: str, value: Any) -> None:
    model = models.trained()
    setattr(model, name, value)
    assert find_facts(model, input_size=models.SIZE).sources["mean"] == "guess: ImageNet's"


def test_evaluate_takes_scripted_networks_in_any_mode() -> None:
    batch = models.images(10)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    labels = network.eval()(batch).argmax(1)
    scripted = torch.jit.script(network.train())
    before = models.state(scripted)
    assert adadfq_plugin.evaluate(scripted, [(batch, labels)]).top1 == 1
    assert scripted.training
    assert models.same(before, models.state(scripted))
    assert adadfq_plugin.evaluate(torch.jit.freeze(scripted.eval()), [(batch, labels)]).top1 == 1


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_is_no_matter_or_refused(grad: Any) -> None:
    prepared = models.prepared()
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    with grad():
        if grad is torch.no_grad:
            assert len(adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD).samples) == 24
        else:
            with pytest.raises(SettingsError, match="inference_mode"):
                adadfq_plugin.calibrate(prepared, settings=QUICK_G, **TOLD)
            assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())


def test_other_things_than_models_and_settings_are_named() -> None:
    cases: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: adadfq_plugin.quantize("resnet18"), "'resnet18' is no torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: adadfq_plugin.quantize(models.trained(), scheme=4), "scheme = 4"),  # type: ignore[arg-type]
        (lambda: adadfq_plugin.quantize(models.trained(), settings="fast"), "settings = 'fast'"),  # type: ignore[arg-type]
        (lambda: adadfq_plugin.calibrate(None), "None is no torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: adadfq_plugin.calibrate(models.prepared(), seed=-1), "seed = -1"),
        (lambda: adadfq_plugin.calibrate(models.prepared(), minutes=float("inf")), "minutes = inf"),
        (lambda: adadfq_plugin.quantize(models.trained(), seed=-1), "seed = -1"),
        (lambda: adadfq_plugin.quantize(models.trained(), seed=1.5), "seed = 1.5"),  # type: ignore[arg-type]
        (lambda: adadfq_plugin.synthesize(models.trained(), 2, minutes=0), "minutes = 0"),
        (lambda: adadfq_plugin.synthesize(models.trained(), 2.5), "count = 2.5"),  # type: ignore[arg-type]
        (lambda: adadfq_plugin.synthesize(models.trained(), 2, settings="fast"), "settings = 'fast'"),
        (lambda: adadfq_plugin.quantize(cast(nn.Module, torch.compile(models.trained()))), "its ._orig_mod"),
        (lambda: adadfq_plugin.quantize(models.trained(), device="nowhere"), "device 'nowhere'"),
    )
    for call, words in cases:
        with pytest.raises(AdaDFQError, match=words):
            call()


def test_broken_weights_are_named_before_anything_is_prepared() -> None:
    model = models.trained()
    model.bn2.running_var[0] = -1
    for call in (adadfq_plugin.prepare, adadfq_plugin.quantize):
        with pytest.raises(ModelError, match=r"'bn2.running_var' holds a negative variance"):
            call(model, input_size=16)


def test_samples_with_whole_settings_and_a_preset_are_refused() -> None:
    settings = AdaDFQSettings(**{**QUICK_G, "warmup_steps": 1})
    assert len(adadfq_plugin.synthesize(models.trained(), 9, settings=settings, **TOLD)) == 9
    with pytest.raises(SettingsError, match="preset"):
        adadfq_plugin.synthesize(models.trained(), 9, settings=settings, preset="paper_cifar", **TOLD)


def test_a_method_that_returns_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    method = api.methods().get("noise")
    monkeypatch.setattr(type(method), "calibrate", lambda *_: None)
    with pytest.raises(BrokenPluginError, match="method 'noise' returned NoneType"):
        adadfq_plugin.calibrate(models.prepared(), method="noise", settings=QUICK, **TOLD)
