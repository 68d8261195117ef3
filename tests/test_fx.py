"""The FX backend: what is calibrated is what torch.ao's own convert gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast
from zipfile import ZIP_DEFLATED, ZipFile

import models
import pytest
import torch
from fx_models import EXAMPLE, Inverted, headed, users_mapping
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import (
    QConfigMapping,
    default_dynamic_qat_qconfig,
    default_dynamic_qconfig,
    default_embedding_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import adadfq_plugin
from adadfq_plugin.backends.fx import (
    FXBackend,
    FXPrepared,
    _engine_of,
    best_engine,
    qconfig_mapping,
    using_engine,
)
from adadfq_plugin.backends.fx import kernels as kernels_module
from adadfq_plugin.config import Scheme
from adadfq_plugin.contracts import Backend, Phase, Prepared
from adadfq_plugin.errors import DataError, ModelError, SettingsError

pytestmark = pytest.mark.usefixtures("seeded")


def test_it_is_a_backend() -> None:
    assert isinstance(FXBackend(), Backend)
    assert isinstance(FXBackend().open(models.prepared()), Prepared)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mapping", ["ours", "users", "default"])
def test_convert_gives_what_was_calibrated(bits: int, mapping: str) -> None:
    if mapping == "default" and bits != 8:
        pytest.skip("torch.ao's default mapping has 8 bits")
    if mapping == "ours":
        prepared = models.prepared(bits)
    else:
        chosen = users_mapping(bits) if mapping == "users" else get_default_qat_qconfig_mapping("x86")
        prepared = prepare_qat_fx(models.trained().train(), chosen, EXAMPLE)
    batch = models.images(128)
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        calibrated = opened.module(batch)
    opened.commit()
    with torch.no_grad():
        fake = prepared.eval()(batch)
        converted = convert_fx(copy.deepcopy(prepared))(batch)
    assert torch.equal(calibrated, fake)
    assert (fake - converted).abs().mean() <= 0.05 * fake.std()
    assert (fake.argmax(1) == converted.argmax(1)).float().mean() >= 0.98
    assert fake.std() > 0


def test_the_original_is_touched_by_commit_alone() -> None:
    prepared = models.prepared(4)
    before = models.state(prepared)
    opened = FXBackend().open(prepared)
    models.observed(opened, models.images(16))
    opened.convert()
    assert models.same(before, models.state(prepared))
    opened.commit()
    assert not models.same(before, models.state(prepared))


def test_phases_restore_switches_also_after_an_exception() -> None:
    opened = FXBackend().open(models.prepared(4))
    before = models.state(opened.module)
    outer, inner = opened.phase(Phase.EVALUATE), opened.phase(Phase.FLOAT)
    with pytest.raises(KeyError), outer, inner:
        raise KeyError
    assert models.same(before, models.state(opened.module))


def test_phases_do_what_they_say() -> None:
    opened = FXBackend().open(models.prepared(3))
    batch = models.images(8)
    with torch.no_grad():
        with opened.phase(Phase.FLOAT):
            exact = opened.module(batch)
        with opened.phase(Phase.OBSERVE):
            assert torch.equal(opened.module(batch), exact)
        opened.set_ranges()
        with opened.phase(Phase.EVALUATE):
            assert not torch.allclose(opened.module(batch), exact, atol=1e-3)
    for step in opened.steps():
        step.requires_grad_(True)
    with opened.phase(Phase.TRAIN):
        opened.module(batch).square().mean().backward()
    assert all(step.grad is not None for step in opened.steps()[:3])
    assert all(weight.grad is not None for weight in opened.weights())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("there", [False, True])
def test_observed_models_are_calibrated_on_a_gpu(there: bool) -> None:
    prepared = prepare_fx(models.trained(), get_default_qconfig_mapping("x86"), EXAMPLE)
    told: dict[str, Any] = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "method": "noise"}
    settings = {"samples": 16, "batch_size": 8, "range_samples": 16}
    if there:
        adadfq_plugin.calibrate(prepared.cuda(), settings=settings, **told)
    else:
        adadfq_plugin.calibrate(prepared, settings=settings, device="cuda", **told)
    batch = models.images(64)
    with torch.no_grad():
        exact = models.trained()(batch)
        assert (convert_fx(prepared.cpu())(batch) - exact).abs().mean() <= 0.1 * exact.std()


def test_a_saved_model_is_read_for_its_own_engine(tmp_path: Path) -> None:
    engine = next(
        each for each in ("qnnpack", "fbgemm") if each in torch.backends.quantized.supported_engines
    )
    opened = FXBackend().open(FXBackend().prepare(models.trained(), models.SIZE, Scheme(engine=engine)))
    models.observed(opened, batch := models.images(8))
    converted = opened.convert()
    FXBackend().save(converted, batch[:1], tmp_path / "net.pt")
    with torch.no_grad():
        assert torch.equal(FXBackend().load(tmp_path / "net.pt")(batch), converted(batch))
    assert _engine_of(tmp_path / "net.pt") == engine
    with ZipFile(tmp_path / "bare.pt", "w") as archive:
        archive.writestr("net/code", "")
    assert _engine_of(tmp_path / "bare.pt") == best_engine()
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.pt is no converted model"):
        FXBackend().load(tmp_path / "text.pt")


def test_engine_is_restored_and_named_when_missing() -> None:
    before = torch.backends.quantized.engine
    with pytest.raises(ZeroDivisionError), using_engine(best_engine()):
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == before
    with pytest.raises(SettingsError, match="'tpu'"), using_engine("tpu"):
        pass
    with pytest.raises(SettingsError, match="no quantized engine"):
        kernels_module.best_engine([], "x86_64")


def test_refusals_name_the_culprit() -> None:
    backend = FXBackend()
    with pytest.raises(ModelError, match="Residual is not prepared"):
        backend.open(models.trained())
    prepared = models.prepared()
    opened = backend.open(prepared)
    models.observed(opened, models.images(8))
    with pytest.raises(ModelError, match="already converted"):
        backend.open(opened.convert())
    nothing = prepare_qat_fx(models.trained().train(), QConfigMapping(), EXAMPLE)
    with pytest.raises(ModelError, match="quantizes nothing"):
        backend.open(nothing)


def test_prepare_fx_default_mapping_converts() -> None:
    prepared = prepare_fx(models.trained(), get_default_qconfig_mapping("x86"), EXAMPLE)
    opened = FXBackend().open(prepared)
    batch = models.images(64)
    models.observed(opened, batch)
    opened.commit()
    expected = models.trained()(batch)
    assert (convert_fx(prepared)(batch) - expected).abs().mean() < 0.2 * expected.std()


def test_saved_model_reloads(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "model.pt"
    opened = FXBackend().open(models.prepared())
    models.observed(opened, models.images(32))
    converted = opened.convert()
    FXBackend().save(converted, torch.zeros(1, *models.SIZE), path)
    batch = models.images(7)
    assert torch.equal(FXBackend().load(path)(batch), converted(batch))
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"model\.pt"):
        FXBackend().load(path)


def test_saved_archive_is_compressed_and_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    opened = FXPrepared(prepare_qat_fx(Inverted(nn.ReLU6()).train(), qconfig_mapping(Scheme()), (x,)))
    with torch.no_grad(), opened.phase(Phase.OBSERVE):
        opened.module(x)
    opened.set_ranges("mse")
    converted, backend, path = opened.convert(), FXBackend(), tmp_path / "quantized.pt"
    backend.save(converted, x, path)
    assert [each.name for each in tmp_path.iterdir()] == ["quantized.pt"]
    with ZipFile(path) as archive:
        assert all(item.compress_type == ZIP_DEFLATED for item in archive.infolist() if item.file_size > 64)
    with torch.no_grad():
        torch.testing.assert_close(backend.load(path)(x), converted(x), rtol=0, atol=0)


def test_multiply_adds_on_integers_leave_out_what_stays_in_float() -> None:
    """And count a layer as often as it runs, and the product of two integer tensors."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.up = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 3),
                nn.ConvTranspose2d(4, 4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(self.conv(self.conv(self.stem(x))))
            return torch.matmul(x, x.transpose(2, 3)).flatten(1)

    mapping = qconfig_mapping(Scheme()).set_module_name("stem", None)
    opened = FXBackend().open(prepare_qat_fx(Twice().train(), mapping, EXAMPLE))
    models.observed(opened, EXAMPLE[0])
    side = models.SIZE[1]
    layers = 4 * 4 * 9 * ((side - 2) ** 2 + 2 * (side - 4) ** 2)
    assert (
        FXBackend().integer_macs(opened.convert(), torch.zeros(2, *models.SIZE))
        == layers + 4 * (side - 2) ** 3
    )


def test_a_layer_in_float_is_not_copied() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), norm := nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 1), norm, nn.Flatten()
    )
    mapping = qconfig_mapping(Scheme()).set_object_type(nn.GroupNorm, None)
    prepared = prepare_qat_fx(model.train(), mapping, EXAMPLE)
    opened = FXBackend().open(prepared)
    assert not any("repeated call" in note for note in opened.notes)
    assert opened.origins == {}


class Drops(models.Residual):
    """A network that draws, at every pixel or seldom a whole image."""

    def __init__(self, seldom: bool) -> None:
        super().__init__()
        self.seldom = seldom

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.full_like(x[:, :1, :1, :1], 0.97) if self.seldom else torch.full_like(x, 0.8)
        return super().forward(x * torch.bernoulli(kept))


@pytest.mark.parametrize("seldom", [False, True])
def test_a_graph_that_draws_random_numbers_is_refused(seldom: bool) -> None:
    prepared = prepare_qat_fx(Drops(seldom).train(), qconfig_mapping(Scheme()), EXAMPLE)
    told: dict[str, Any] = {"example_inputs": EXAMPLE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    for teacher in (None, models.trained()):  # also where the teacher itself draws none
        for seed in range(4):
            with pytest.raises(ModelError, match="draws random numbers"):
                adadfq_plugin.calibrate(prepared, teacher=teacher, seed=seed, **told)


@pytest.mark.parametrize(
    ("prepare", "mapping"),
    [
        (prepare_qat_fx, qconfig_mapping(Scheme()).set_object_type(nn.Linear, default_dynamic_qat_qconfig)),
        (prepare_qat_fx, QConfigMapping().set_global(default_dynamic_qconfig)),
        (prepare_fx, QConfigMapping().set_global(default_dynamic_qconfig)),
    ],
    ids=["one layer's", "all", "all, observed"],
)
def test_a_range_of_each_batch_is_refused(prepare: Any, mapping: QConfigMapping) -> None:
    prepared = prepare(models.trained().train(prepare is prepare_qat_fx), mapping, EXAMPLE)
    with pytest.raises(ModelError, match="takes the range of each batch"):
        FXBackend().open(prepared)


def test_functional_modules_of_a_float_network_are_no_conversion() -> None:
    class Adds(models.Residual):
        def __init__(self) -> None:
            super().__init__()
            self.add = nnq.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.relu(self.add.add(self.bn2(self.conv2(x)), x))
            return cast(Tensor, self.linear(self.pool(self.relu(self.bn3(self.conv3(x)))).flatten(1)))

    assert not FXBackend().recognises(Adds())
    with pytest.raises(ModelError, match="is not prepared"):
        FXBackend().open(Adds())


def test_an_embedding_has_torch_aos_own_quantizer() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.positions = nn.Conv2d(3, 8, 4, stride=4), nn.Embedding(16, 8)
            self.linear = nn.Linear(8, 5)
            self.register_buffer("places", torch.arange(16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).flatten(2).transpose(1, 2) + self.positions(self.places)
            return cast(Tensor, self.linear(x.mean(1)))

    model = Positions().eval()
    mapping = users_mapping(8).set_object_type(nn.Embedding, default_embedding_qat_qconfig)
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), mapping, EXAMPLE)
    told: dict[str, Any] = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    sizes = {
        "samples": 16,
        "steps": 2,
        "warmup_steps": 2,
        "refine_steps": 1,
        "range_samples": 16,
        "batch_size": 8,
    }
    adadfq_plugin.calibrate(prepared, settings={**sizes, "generator_width": 16}, **told)
    converted = convert_fx(copy.deepcopy(prepared.eval()))
    assert isinstance(converted.positions, nnq.Embedding)
    batch = models.images(16)
    with torch.no_grad():
        exact = model(batch)
        assert (converted(batch) - exact).abs().mean() <= 0.1 * exact.std()


@pytest.mark.parametrize("which", ["input", "output"])
def test_models_that_take_or_give_integers_are_refused(which: str) -> None:
    custom = PrepareCustomConfig()
    getattr(custom, f"set_{which}_quantized_indexes")([0])
    prepared = prepare_qat_fx(
        models.trained().train(), users_mapping(8), EXAMPLE, prepare_custom_config=custom
    )
    with pytest.raises(ModelError, match=rf"prepared with set_{which}_quantized_indexes\(\[0\]\)"):
        FXBackend().open(prepared)


@pytest.mark.parametrize("width", [8, 6])
def test_a_call_is_tried_for_each_engine_that_may_run_it(width: int) -> None:
    """fbgemm's kernel is wrong for one width, oneDNN's for the other."""
    if not {"onednn", "x86"} <= set(torch.backends.quantized.supported_engines):
        pytest.skip("no two engines for one CPU in this build of torch")
    layers = nn.ConvTranspose2d(8, width, 2, stride=2), nn.ReLU(), nn.Conv2d(width, 8, 1)
    model, batch = headed(nn.Conv2d(3, 8, 3), *layers), models.images(32)
    prepared = FXBackend().prepare(model, models.SIZE, Scheme(engine="onednn"))
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    opened.commit()
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(batch)
    for engine in ("onednn", "x86"):
        with torch.no_grad(), using_engine(engine):
            converted = convert_fx(cast(fx.GraphModule, copy.deepcopy(prepared).eval()))(batch)
        assert (converted - fake).abs().mean() <= 0.05 * fake.std(), engine


def test_a_model_is_saved_for_its_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine of the moment is, for freezing packs the weights."""
    engines = torch.backends.quantized.supported_engines
    first, other = [each for each in ("onednn", "qnnpack", "x86") if each in engines][:2]
    opened = FXBackend().open(FXBackend().prepare(models.trained(), models.SIZE, Scheme(engine=first)))
    models.observed(opened, batch := models.images(8))
    converted, seen, freeze = opened.convert(), [], torch.jit.freeze

    def frozen(script: Any) -> Any:
        seen.append(torch.backends.quantized.engine)
        return freeze(script)

    monkeypatch.setattr(torch.jit, "freeze", frozen)
    with using_engine(other):
        FXBackend().save(converted, batch[:1], tmp_path / "net.pt")
    assert seen == [first]


def test_what_torch_ao_does_not_look_into_stays_in_float() -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.linear = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, models.CLASSES)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return cast(Tensor, self.linear(self.encoder(x).mean(1)))

    model, batch = Encoded().eval(), models.images(32)
    prepared = FXBackend().prepare(model, models.SIZE, Scheme(weight_bits=4, activation_bits=4))
    opened = FXBackend().open(prepared)
    assert models.told(opened) == ["encoder stays in float: torch.ao does not look into it"]
    assert not [
        each for each in prepared.get_submodule("encoder").modules() if hasattr(each, "weight_fake_quant")
    ]
    own = FXBackend().open(prepare_qat_fx(copy.deepcopy(model).train(), qconfig_mapping(Scheme()), EXAMPLE))
    for each in (opened, own):
        models.observed(each, batch)
        with torch.no_grad(), each.phase(Phase.EVALUATE):  # its fast path, in both
            fake, converted = each.module(batch), each.convert()(batch)
        assert (converted - fake).abs().mean() <= 0.05 * fake.std()


def test_repeated_calls_are_counted_without_their_normalisation() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, models.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(3):
                x = self.norm(self.conv(x)).relu()
            return cast(Tensor, self.linear(x.mean((2, 3))))

    opened = FXBackend().open(FXBackend().prepare(Thrice().eval(), models.SIZE, Scheme()))
    assert [note for note in opened.notes if note.startswith("2 repeated calls of layers")]


def test_buffers_that_a_network_changes_come_back() -> None:
    class Counts(models.Residual):
        def __init__(self) -> None:
            super().__init__()
            self.count: Tensor
            self.seen: Tensor
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen = self.seen + x.abs().mean()
            return super().forward(x)

    model = Counts().eval()
    told: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "method": "noise", "teacher": model}
    prepared = adadfq_plugin.prepare(model, models.SIZE)
    with pytest.raises(ModelError, match="num_classes=7"):
        adadfq_plugin.calibrate(prepared, num_classes=7, **told)
    settings = {"samples": 8, "batch_size": 4, "steps": 1, "range_samples": 8}
    adadfq_plugin.calibrate(prepared, settings=settings, **told)
    assert (model.count.item(), model.seen.item()) == (0, 0)
