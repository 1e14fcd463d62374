"""What holds for every adapter, whatever layer, method or base it is on: one table of checks for one table of cases.

    for check in CHECKS.values():
        check(Case(lambda: nn.Sequential(MyLayer(8, 4)), lambda: torch.randn(3, 8)))

The oracle knows nothing of the engine: it takes A and B from the adapter's file, adds s B A to the weights of a plain float64
model, and runs that.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_core import (
    LoraConfig,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    unload,
    unmerge_adapter,
)
from tests.support import tiny

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Case:
    """A model with adapters, and what is needed to work out by hand what it computes.

    Attributes:
        build: makes the model, in float32; with the same values each time if torch's seed is the same.
        x: makes what it reads.
        as_matrix: {path of an adapted layer: its weight, or one of the same shape, as a view of (d_out, d_in)}; without an
            entry the weight's first dimension is d_out.
        targets: what `target_modules` names.
        settings: other fields of the configuration; not those whose update depends on more than A and B.
        weights: {path in the file: path of the weight}, where that is not the layer's `weight`.
        factors: {path in the file: what its scaling is multiplied by}.
        kind: the class of the configuration.
        update: for a method with other tensors than A and B, what it adds to W but for the scaling, (d_out, d_in), by the
            file's tensors and the path of the layer.
        run: what the model computes.
        tolerance: how far float32 may be from float64, relative to the largest output: 64 sums of 1.2e-7 by default.
        device: where the model is; what is worked out by hand is worked out on the CPU.
    """

    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    as_matrix: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    targets: tuple[str, ...] = ("0",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    kind: type[LoraConfig] = LoraConfig
    update: Callable[[Mapping[str, Tensor], str], Tensor] | None = None
    run: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    tolerance: float = 1e-5
    device: str = "cpu"

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().to(self.device)

    def read(self) -> Tensor:
        torch.manual_seed(1)
        return self.x().to(self.device)

    def config(self) -> LoraConfig:
        return self.kind(**{"r": 2, "lora_alpha": 3, "target_modules": list(self.targets), **self.settings})

    def adapted(self) -> nn.Module:
        model = self.base()
        inject(model, self.config())
        return tiny.randomize(model)

    def output(self, model: nn.Module) -> Tensor:
        return self.run(model, self.read()).detach()

    def assert_near(self, found: Tensor, expected: Tensor) -> None:
        atol = self.tolerance * max(1, expected.abs().max().item())
        torch.testing.assert_close(found.cpu().double(), expected.cpu().double(), rtol=0, atol=atol)


def files_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of the adapter's files."""
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
        return config, load_file(Path(directory) / "adapter_model.safetensors")


@torch.no_grad()
def equation(case: Case, model: nn.Module) -> Tensor:
    """What the adapted `model` computes, by hand: a plain float64 model whose weights have s B A added."""
    config, tensors = files_of(model)
    plain, x = case.base().cpu().double(), case.read().cpu()
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for path in case.targets if case.update else ():
        upright = case.as_matrix.get(path, lambda W: W.view(len(W), -1))
        upright(plain.get_parameter(f"{path}.weight")).add_(scaling * case.update(tensors, path))
    for key, A in tensors.items():
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if not key.endswith(a):
                continue
            path = key.removeprefix(PREFIX).removesuffix(f".{a}")
            B = tensors[key.removesuffix(a) + b]
            weight = plain.get_parameter(case.weights.get(path, f"{path}.weight"))
            upright = case.as_matrix.get(path, lambda W: W.view(len(W), -1))
            W, A, B = upright(weight), A.double().flatten(1), B.double().flatten(1)
            if W.dim() == 3:  # E matrices: the rows of A are theirs one after the other, the columns of B rank by rank
                D = torch.einsum("ore,eri->eoi", B.view(len(B), -1, len(W)), A.view(len(W), -1, A.shape[1]))
            else:
                D = B @ A
            W.add_(case.factors.get(path, 1) * scaling * D)
    return case.run(plain, x.double() if x.is_floating_point() else x)


def check_forward(case: Case) -> None:
    """The forward is the equation; a fresh adapter changes no bit."""
    model, fresh = case.adapted().eval(), case.base().eval()
    expected, before = equation(case, model), case.output(fresh)
    case.assert_near(case.output(model), expected)
    assert not torch.equal(case.output(model), before), "the adapter has no effect"
    inject(fresh, case.config())
    assert torch.equal(case.output(fresh), before)


def check_gradients(case: Case) -> None:
    """Everything that is trained gets a gradient, by finite differences the right one, and nothing else does."""
    model = case.adapted().double().eval()
    x = case.read()
    x = x.double() if x.is_floating_point() else x
    case.run(model, x).sin().sum().backward()
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, path
        if not parameter.requires_grad:
            continue
        way, step, sums = torch.sin(torch.arange(parameter.numel()).to(parameter)).view_as(parameter), 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * way)
                sums.append(case.run(model, x).sin().sum())
                parameter.sub_(sign * step * way)
        slope = (sums[0] - sums[1]) / (2 * step)
        # Its error is of the third order in the step; what is left is rounding, 1e-16 / 1e-5 times the sum.
        torch.testing.assert_close((parameter.grad * way).sum(), slope, rtol=1e-6, atol=1e-7, msg=path)


def check_transforms(case: Case) -> None:
    """torch.func goes through it: gradients of each sample by itself, all at once, are those of one after the other."""
    model, x = case.adapted().eval(), case.read()
    samples = torch.stack([x, x.flip(0)])
    trained = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(model, parameters):
            return case.run(model, x).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, samples)
    for i, sample in enumerate(samples):
        expected = torch.autograd.grad(loss(trained, sample), list(trained.values()))
        for path, gradient in zip(trained, expected, strict=True):
            case.assert_near(found[path][i], gradient)


def check_disabled(case: Case) -> None:
    """Switched off, it is the base."""
    model, expected = case.adapted().eval(), case.output(case.base().eval())
    with disable_adapters(model):
        assert torch.equal(case.output(model), expected)


def check_files(case: Case) -> None:
    """An adapter that was saved computes the same on another base, and is saved as the same bytes."""
    model, other = case.adapted().eval(), case.base().eval()
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)
        load_adapter(other, directory)
    if case.device == "cpu":
        assert torch.equal(case.output(other), case.output(model))
    else:  # a GPU's libraries choose another way to multiply where memory is laid out in another way
        case.assert_near(case.output(other), case.output(model))
    (config, tensors), (again, same) = files_of(model), files_of(other)
    assert config == again and tensors.keys() == same.keys()
    assert all(torch.equal(tensor, same[key]) for key, tensor in tensors.items())


def check_fold(case: Case) -> None:
    """Folded, it computes the equation; unmerged, every byte is back; merged for good, plain layers are left."""
    model = case.adapted().eval()
    expected, before, adapted = equation(case, model), tiny.snapshot(model), case.output(model)
    merge_adapter(model)
    case.assert_near(case.output(model), expected)
    unmerge_adapter(model)
    assert tiny.snapshot(model) == before and torch.equal(case.output(model), adapted)
    merge_and_unload(model)
    case.assert_near(case.output(model), expected)
    plain = case.base()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()


def check_unload(case: Case) -> None:
    """Unloading gives every byte back: values, flags, objects, hooks."""
    model = case.base()
    before = tiny.snapshot(model)
    inject(model, case.config())
    tiny.randomize(model)
    case.output(model)
    unload(model)
    assert tiny.snapshot(model) == before


CHECKS: dict[str, Callable[[Case], None]] = {
    "forward": check_forward,
    "gradients": check_gradients,
    "transforms": check_transforms,
    "disabled": check_disabled,
    "files": check_files,
    "fold": check_fold,
    "unload": check_unload,
}
