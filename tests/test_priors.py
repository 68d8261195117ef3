"""The priors on modules, traced graphs and exported graphs; their choice, with its reasons."""

from __future__ import annotations

from typing import Any, cast

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adadfq_plugin.config import GeneratorSettings
from adadfq_plugin.errors import ModelError, SettingsError
from adadfq_plugin.facts import Facts
from adadfq_plugin.functional import head_similarity, patch_similarity_entropy
from adadfq_plugin.priors import (
    MOST_QUERIES,
    BNStatistics,
    HeadSimilarity,
    ImageNorm,
    PatchSimilarity,
    Prior,
    PriorSum,
    TotalVariation,
    _attention,
    choose_priors,
)
from adadfq_plugin.teacher import Teacher

pytestmark = pytest.mark.usefixtures("seeded")

FACTS = Facts(models.SIZE, num_classes=5)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_statistics_prior_is_zero_on_its_own_statistics(scale: float) -> None:
    """Also where the variance is no larger than the epsilon."""
    model = models.trained()
    batch = models.images(64)
    model.train()
    with torch.no_grad():
        model.conv1.weight.mul_(scale)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(batch)
    model.eval()
    first = nn.Sequential(model.conv1, model.bn1)
    with torch.no_grad(), BNStatistics().watch(Teacher(first, FACTS)) as loss:
        first(batch)
        own = loss()
        first(batch * 2 + 1)
        other = loss()
    assert own < 1e-4  # the running variance is the unbiased one
    assert other > 10 * own


def test_relative_statistics_against_numpy() -> None:
    model, batch = models.trained(), models.images(8)
    bn, x = model.bn1, model.conv1(batch).detach().double().numpy()
    mean, deviation = bn.running_mean.double().numpy(), (bn.running_var.double().numpy() + bn.eps) ** 0.5
    expected = (((x.mean((0, 2, 3)) - mean) / deviation) ** 2).mean()
    expected += (((x.var((0, 2, 3)) + bn.eps) ** 0.5 / deviation - 1) ** 2).mean()
    first = nn.Sequential(model.conv1, bn)
    with torch.no_grad(), BNStatistics().watch(Teacher(first, FACTS)) as loss:
        first(batch)
        assert abs(loss().item() - expected) < 1e-4 * expected


def test_priors_add_up_and_leave_no_hooks() -> None:
    model = models.trained()
    prior = PriorSum([(2.0, BNStatistics()), (3.0, TotalVariation())])
    batch = models.images(8)
    teacher = Teacher(model, FACTS)
    with (
        BNStatistics().watch(teacher) as bns,
        TotalVariation().watch(teacher) as tv,
        prior.watch(teacher) as total,
    ):
        model(batch)
        assert torch.allclose(total(), 2 * bns() + 3 * tv())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Transformer(nn.Module):
    """Patches, one attention with or without the fused kernel, LayerNorm, a head."""

    def __init__(self, *, fused: bool = True, heads: int = 2, norm: bool = True) -> None:
        super().__init__()
        self.fused, self.heads = fused, heads
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(1, heads, 16, 16))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        q, k, v = (
            self.qkv(tokens)[..., start : start + 8].unflatten(2, (self.heads, -1)).transpose(1, 2)
            for start in (0, 8, 16)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            y = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + self.bias).softmax(-1) @ v
        return cast(Tensor, self.head(y.transpose(1, 2).flatten(2).mean(1)))


def forms(model: nn.Module) -> dict[str, nn.Module]:
    """The same network in modules, as a traced graph and as an exported one."""
    exported = torch.export.export(model.eval(), (models.images(2),)).module()
    return {"modules": model, "traced": fx.symbolic_trace(model), "exported": cast(nn.Module, exported)}


def value(prior: Prior, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The prior's loss of a batch, and its gradient."""
    batch = batch.clone().requires_grad_(True)
    with prior.watch(Teacher(model, FACTS)) as loss:
        model(batch)
        found = loss()
    return found.detach(), torch.autograd.grad(found, batch)[0]


@pytest.mark.parametrize("prior", [PatchSimilarity(), HeadSimilarity()], ids=lambda each: each.name)
def test_priors_see_the_same_in_modules_traces_and_exports(prior: Prior) -> None:
    model, batch = Transformer().requires_grad_(False), models.images(2)
    found = {name: value(prior, form, batch) for name, form in forms(model).items()}
    for loss, gradient in found.values():
        assert gradient.abs().sum() > 0
        assert torch.allclose(loss, found["modules"][0], rtol=1e-5)
        assert torch.allclose(gradient, found["modules"][1], rtol=1e-3, atol=1e-7)


def test_patches_are_what_attention_returns_else_norms_else_convolutions() -> None:
    batch = models.images(4)
    attention = Transformer()
    kept: list[Tensor] = []
    loss = value(PatchSimilarity(), attention, batch)[0]
    with torch.no_grad():
        tokens = attention.norm(attention.patch(batch).flatten(2).transpose(1, 2))
        q, k, v = (each.unflatten(2, (2, 4)).transpose(1, 2) for each in attention.qkv(tokens).chunk(3, 2))
        kept.append(
            F.scaled_dot_product_attention(q, k, v, attn_mask=attention.bias).transpose(1, 2).flatten(2)
        )
    assert torch.allclose(loss, -patch_similarity_entropy(kept[0], pairs=128).mean())
    unfused = Transformer(fused=False)
    with torch.no_grad():
        tokens = unfused.norm(unfused.patch(batch).flatten(2).transpose(1, 2))
    assert torch.allclose(
        value(PatchSimilarity(), unfused, batch)[0], -patch_similarity_entropy(tokens, pairs=128).mean()
    )
    bare = Transformer(fused=False, norm=False)
    with torch.no_grad():
        tokens = bare.patch(batch).flatten(2).transpose(1, 2)
    assert torch.allclose(
        value(PatchSimilarity(), bare, batch)[0], -patch_similarity_entropy(tokens, pairs=128).mean()
    )
    for each in (attention, unfused, bare):
        assert PatchSimilarity().reason(Teacher(each, FACTS)) is None


@pytest.mark.parametrize("heads", [2, 8])
def test_heads_of_fused_attention_are_those_of_its_softmax(heads: int) -> None:
    fused, plain = Transformer(heads=heads), Transformer(heads=heads, fused=False)
    plain.load_state_dict(fused.state_dict())
    batch = models.images(3)
    one, other = (value(HeadSimilarity(), each, batch) for each in (fused, plain))
    assert torch.allclose(one[0], other[0], rtol=1e-5)
    assert torch.allclose(one[1], other[1], rtol=1e-3, atol=1e-7)
    if heads == 2:
        maps: list[Tensor] = []
        with HeadSimilarity._calls(plain) as calls:
            plain(batch)
            maps.extend(call.output for call in calls)
        assert torch.allclose(one[0], -head_similarity(maps[0]).mean())


class SplitAttention(nn.Module):
    """Weighs channels by a softmax over them, as ResNeSt weighs its branches."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * x.softmax(1)).flatten(1)


def test_priors_say_why_not() -> None:
    linear = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)), FACTS)
    one_head, trained = Teacher(Transformer(heads=1), FACTS), Teacher(models.trained(), FACTS)
    assert "no BatchNorm" in str(BNStatistics().reason(linear))
    assert "no attention, normalisation or convolution" in str(PatchSimilarity().reason(linear))
    assert "no attention of several heads" in str(HeadSimilarity().reason(one_head))
    split = Teacher(nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Flatten(2, 3), SplitAttention()), FACTS)
    assert "no attention of several heads" in str(HeadSimilarity().reason(split))
    assert TotalVariation().reason(linear) is None
    assert "one pixel" in str(TotalVariation().reason(Teacher(nn.Identity(), Facts((3, 1, 9), 5))))
    assert BNStatistics().reason(trained) is None
    assert len(trained.batch_norms) == 3


def chosen(model: nn.Module, **settings: Any) -> tuple[dict[str, float], list[str]]:
    """Weights by name, and the reasons."""
    prior, notes = choose_priors(GeneratorSettings(**settings), models.teacher(model))
    return {each.name: weight for weight, each in prior.parts}, notes


def test_a_network_gets_the_priors_it_admits() -> None:
    assert chosen(models.trained()) == ({"bn_statistics": 10.0}, ["prior bn_statistics has weight 10"])
    weights, notes = chosen(Transformer())
    assert weights == {}
    assert [note.partition(" (")[0] for note in notes] == [
        "prior bn_statistics is left out: the network has no BatchNorm layer that keeps running statistics"
    ]
    weights, notes = chosen(Transformer(), patch_similarity=0.1, tv=0.5, image_norm=0.25)
    assert weights == {"patch_similarity": 0.1, "total_variation": 0.5, "image_norm": 0.25}
    assert "prior patch_similarity has weight 0.1" in notes
    mixed = nn.Sequential(models.trained().conv1, models.trained().bn1, nn.Conv2d(8, 3, 1), Transformer())
    assert chosen(mixed, head_similarity=2.0)[0] == {"bn_statistics": 10.0, "head_similarity": 2.0}
    assert chosen(models.trained(), gamma=0.0, patch_similarity=3.0)[0] == {"patch_similarity": 3.0}


def test_what_cannot_be_used_is_an_error_with_the_reason() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    assert chosen(linear)[0] == {}
    with pytest.raises(ModelError, match=r"'patch_similarity' can't be used: .*no attention.*'noise'"):
        chosen(linear, patch_similarity=1.0)
    with pytest.raises(ModelError, match=r"'head_similarity' can't be used: .*several heads"):
        chosen(Transformer(heads=1), head_similarity=1.0)
    with pytest.raises(SettingsError, match="gamma = 0 leaves no prior"):
        chosen(models.trained(), gamma=0.0)
    untrained = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(1568, 5)).eval()
    with pytest.raises(ModelError, match="never trained"):
        chosen(untrained)


def test_a_sum_of_no_priors_is_zero() -> None:
    with PriorSum([]).watch(Teacher(models.trained(), FACTS)) as loss:
        assert loss() == 0.0


def test_a_sum_of_no_priors_is_where_the_network_is() -> None:
    """A device without values stands for a GPU: beside figures that are there, this one has to be as well."""
    with PriorSum([]).watch(Teacher(models.trained().to("meta"), FACTS)) as loss:
        assert loss().device.type == "meta"


def test_image_norm_is_of_the_input() -> None:
    loss, gradient = value(ImageNorm(), nn.Identity(), torch.full((1, 1, 2, 2), 3.0))
    assert loss == 9.0
    assert torch.equal(gradient, torch.full((1, 1, 2, 2), 6.0 / 4))


class WithHead(nn.Module):
    """An auxiliary head that answers while the network is trained alone, as Inception's."""

    def __init__(self, *, main: bool) -> None:
        super().__init__()
        self.main, self.aux = models.trained() if main else nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        cast(Tensor, self.aux.running_mean).add_(1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.main(x)
        if self.training:
            logits = self.aux(logits)
        answer: Tensor = logits.flatten(2).mean(2) if logits.ndim == 4 else logits
        return answer


def test_layers_that_take_no_part_tell_nothing() -> None:
    model, batch = WithHead(main=True).eval(), models.images(8)
    losses = []
    for network in (model, model.main):
        with torch.no_grad(), BNStatistics().watch(Teacher(network, FACTS)) as loss:
            network(batch)
            losses.append(loss())
    assert torch.equal(*losses)
    assert BNStatistics().reason(Teacher(model, FACTS)) is None
    why = BNStatistics().reason(Teacher(WithHead(main=False).eval(), FACTS))
    assert why is not None
    assert "none of its BatchNorm layers takes part" in why
    assert chosen(WithHead(main=False).eval())[0] == {}


class Masked(nn.Module):
    """An attention of two heads that sees some of its keys."""

    def __init__(self, how: dict[str, Any]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)[:, None].expand(-1, 2, -1, -1)
        return nn.functional.scaled_dot_product_attention(tokens, tokens.flip(1), tokens, **self.how)


def test_heads_do_not_look_at_what_is_masked() -> None:
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    batch = torch.randn(2, 3, 4, 4)
    asked = []
    for how in (
        {"is_causal": True},
        {"attn_mask": seen},
        {"attn_mask": torch.zeros(16, 16).masked_fill(~seen, -torch.inf)},
    ):
        with HeadSimilarity._calls(model := Masked(how)) as calls:
            model(batch)
            maps = _attention(calls[0])
        assert maps is not None
        assert (maps[..., ~seen[:: -(-16 // MOST_QUERIES)]] == 0).all()
        asked.append(maps)
    assert torch.equal(asked[0], asked[1])
    assert torch.equal(asked[0], asked[2])
