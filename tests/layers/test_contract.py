"""Every kind of layer passes the contract's checks, and so does one from outside, as docs/extend.md shows it."""

import io
import re
import sys
import types

import pytest
import torch
import transformers
from torch import nn

from lora_core import LoraConfig, inject, register_kind
from lora_core.errors import ConfigError
from lora_core.layers import LoraLayer, LoraLinear, lora_class
from tests.support import ROOT, tiny
from tests.support.cases import CASES
from tests.support.contract import CHECKS, Case


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name, check):
    CHECKS[check](CASES[name])


PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
KIND, CHECKED, METHOD, BASE, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(snippet, name):
    """What the page shows, run as a module of its own outside of the package."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # pickle looks there
    exec(compile(snippet, "extend.md", "exec"), vars(module))
    return module


@pytest.fixture(scope="module")
def extension():
    return run(KIND, "a_kind")


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("method"))  # it saves an adapter
        return run(METHOD, "a_method")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layer", ["linear", "Conv1D", "convolution"])
def test_a_method_from_outside_passes_the_contract(method, layer, check):
    def update(tensors, path):
        A, B, m = (tensors[f"base_model.model.{path}.middle_{key}"].double() for key in ("A.weight", "B.weight", "m"))
        return B.flatten(1) @ torch.diag(m) @ A.flatten(1)

    build, x, as_matrix = {
        "linear": (lambda: nn.Linear(8, 4), lambda: torch.randn(3, 8), {}),
        "Conv1D": (lambda: transformers.pytorch_utils.Conv1D(4, 8), lambda: torch.randn(3, 8), {"0": lambda W: W.t()}),
        "convolution": (lambda: nn.Conv2d(2, 4, 3), lambda: torch.randn(2, 2, 5, 5), {}),
    }[layer]
    CHECKS[check](Case(lambda: nn.Sequential(build()), x, as_matrix, kind=method.MiddleConfig, update=update))


def test_a_kind_from_outside_passes_the_contract(extension, capsys):
    exec(compile(CHECKED, "extend.md", "exec"), vars(extension))
    assert extension.case.targets == ("0",) and CHECKS


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_it_has_the_other_methods_too(extension, settings):
    model, x = nn.Sequential(extension.Doubled(8, 4)), torch.randn(3, 8)
    inject(model, LoraConfig(r=2, target_modules=["0"], **settings))
    tiny.randomize(model)
    expected = model(x)
    model[0].fold(["default"])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_it_can_be_pickled(extension):
    model, x = nn.Sequential(extension.Doubled(8, 4)), torch.randn(3, 8)
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    tiny.randomize(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), model(x)) and type(other[0]) is type(model[0])


def test_a_subclass_that_keeps_the_forward_is_of_the_kind(extension):
    same = type("Same", (extension.Doubled,), {})
    own = type("Own", (extension.Doubled,), {"forward": lambda self, x: x})
    assert issubclass(lora_class(same(2, 2)), (extension.LoraDoubled, same)) and lora_class(own(2, 2)) is None
    register_kind(extension.Doubled, extension.LoraDoubled)  # again, which says nothing new


@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        (nn.Linear(2, 2), LoraLinear, "base_class must be the class of a layer"),
        (LoraLinear, LoraLinear, "base_class must be the class of a layer"),
        (nn.Bilinear, nn.Linear, "kind must be a subclass of lora_core.layers.LoraLayer"),
        (nn.Linear, LoraLayer, "Linear has the kind LoraLinear already"),
    ],
)
def test_what_is_no_kind_is_refused(base, kind, message):
    with pytest.raises(ConfigError, match=message):
        register_kind(base, kind)
