"""Small networks for the tests, with BatchNorm statistics of their own."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adadfq_plugin.backends.fx import qconfig_mapping
from adadfq_plugin.config import Scheme
from adadfq_plugin.contracts import Phase, Prepared
from adadfq_plugin.facts import find_facts
from adadfq_plugin.teacher import Teacher, make_teacher

SIZE = (3, 16, 16)
CLASSES = 5
NetT = TypeVar("NetT", bound=nn.Module)


class Residual(nn.Module):
    """Convolution, residual addition, strided convolution, pooling: each kind of activation once."""

    def __init__(self, width: int = 8, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        x = self.relu(self.bn3(self.conv3(x)))
        return cast(Tensor, self.linear(self.pool(x).flatten(1)))


def _seen(model: NetT, head: nn.Linear, batches: int) -> NetT:
    """BatchNorm layers of all scales that have seen data, and logits that differ; eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        head.weight.mul_(4)
        model.train()
        for _ in range(batches):
            model(images(32))
    return model.eval()


def trained(width: int = 8, classes: int = CLASSES, seed: int = 0) -> Any:
    """A network whose BatchNorm layers have seen data; eval mode. Needs the ``seeded`` fixture."""
    torch.manual_seed(seed)
    model = Residual(width, classes)
    return _seen(model, model.linear, 20)


class Inverted(nn.Module):
    """Depthwise convolution, bounded activation, squeeze and excitation, maximum, concatenation, odd epsilons."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=True),
            nn.BatchNorm2d(width, eps=1e-3),
            nn.ReLU6(inplace=True),
        )
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width, eps=1e-3)
        self.act = nn.Hardswish(inplace=True)
        self.squeeze, self.excite = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.pool = nn.MaxPool2d(2)
        self.alone = nn.BatchNorm2d(2 * width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.norm(self.depthwise(x)))
        gate = self.excite(nn.functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = torch.cat([self.pool(x), self.pool(y * gate)], 1)
        return cast(Tensor, self.head(self.dropout(self.alone(y).relu().mean((2, 3)))))


def inverted(seed: int = 0) -> Inverted:
    """One whose BatchNorm layers have seen data; eval mode. Needs the ``seeded`` fixture."""
    torch.manual_seed(seed)
    model = Inverted()
    return _seen(model, model.head, 60)


class Token(nn.Module):
    """A class token that is joined with the patches and cut off again between two sums of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.one(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        token, patches = x.split([1, x.shape[1] - 1], 1)
        x = torch.cat([token + self.two(token), patches[:, :9] + self.three(patches[:, :9])], 1)
        return cast(Tensor, self.head(self.norm(x)[:, 0]))


class Positioned(nn.Module):
    """A parameter of the network's own, beside its layers, as position embeddings and class tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.position = nn.Parameter(torch.randn(8, 16, 16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(self.pool(self.stem(x).relu() * self.position).flatten(1)))


def images(count: int) -> Tensor:
    """Smooth random images."""
    return nn.functional.interpolate(torch.randn(count, 3, 4, 4), size=SIZE[1:], mode="bilinear")


def prepared(bits: int = 8, model: nn.Module | None = None) -> Any:
    """A model of ``prepare_qat_fx`` at WxAx."""
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    scheme = Scheme(weight_bits=bits, activation_bits=bits)
    model = trained() if model is None else model
    return prepare_qat_fx(model.train(), qconfig_mapping(scheme), (torch.zeros(2, *SIZE),))


class _Joins(TorchFunctionMode):
    """Notes the quantization parameters of the tensors of each concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[tuple[float, int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat:
            integers = [each for each in args[0] if each.is_quantized]
            self.seen.append({(each.q_scale(), each.q_zero_point()) for each in integers})
        return func(*args, **(kwargs or {}))


def joined(converted: nn.Module, batch: Tensor) -> list[set[tuple[float, int]]]:
    """Scales and zero points of the integers that each concatenation of a converted model joins."""
    joins = _Joins()
    with torch.no_grad(), joins:
        converted(batch)
    return joins.seen


def state(model: nn.Module) -> dict[str, object]:
    """Everything that must come back: tensors, modes and gradient flags."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    return {"tensors": tensors, "modes": modes, "flags": flags, "kinds": kinds}


def same(before: dict[str, object], after: dict[str, object]) -> bool:
    """Whether two states are equal bit for bit and flag for flag."""
    return same_tensors(before, after) and all(
        before[kind] == after[kind] for kind in ("modes", "flags", "kinds")
    )


def same_tensors(before: dict[str, object], after: dict[str, object]) -> bool:
    """Whether the tensors of two states are equal bit for bit."""
    old, new = before["tensors"], after["tensors"]
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def teacher(model: nn.Module | None = None) -> Teacher:
    """P as a frozen copy with its facts."""
    model = trained() if model is None else model
    return make_teacher(model, find_facts(model, input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3))


def told(opened: Prepared) -> list[str]:
    """The notes that are the same on every CPU."""
    return [note for note in opened.notes if "7-bit weights" not in note]


def observed(opened: Prepared, batch: Tensor, how: str = "mse") -> None:
    """Sets the ranges on a batch."""
    with torch.no_grad(), opened.phase(Phase.OBSERVE):
        opened.module(batch)
    opened.set_ranges(how)
