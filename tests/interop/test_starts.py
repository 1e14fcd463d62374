"""PEFT's starts that take more than the weight, as the oracle: CorDA, LoRA-GA, LoftQ, EVA; its files with them, both ways."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    initialize_corda,
    initialize_lora_ga,
    inject,
    load_adapter,
    merge_and_unload,
    quantize_int8,
    quantize_nf4,
    save_adapter,
)
from lora_core.deploy.convert import convert_adapter
from lora_core.deploy.updates import read_updates
from lora_core.errors import FileFormatError, WrongBaseError
from lora_core.layers import LoraLayer
from tests.support import tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore::UserWarning:torch")]

SETTINGS = {"r": 8, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
VARIANTS = [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 3}}]
IDS = torch.arange(5, 69)[None]  # peft takes one row at a time
#: {case: (init_lora_weights, its configuration, the same here)}
CASES = {
    "corda ipm": ("corda", {"corda_method": "ipm"}, lambda m: initialize_corda(m, [{"input_ids": IDS}])),
    "corda kpm": ("corda", {"corda_method": "kpm"}, lambda m: initialize_corda(m, [{"input_ids": IDS}], mode="kpm")),
    "lora_ga": ("lora_ga", {}, lambda m: initialize_lora_ga(m, [{"input_ids": IDS, "labels": IDS}], scale="peft")),
}


@pytest.fixture(autouse=True)
def attrs(monkeypatch):
    """peft's corda imports attrs, which peft does not ask for, for its `dataclass` alone."""
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))


def theirs(case, base, **settings):
    """PEFT's model with this start, untrained; `base` is changed."""
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    init, options, _ = CASES[case]
    config = peft.LoraConfig(**{**SETTINGS, **settings}, init_lora_weights=init)
    if init == "corda":
        config.corda_config = CordaConfig(**options)
        preprocess_corda(base, config, run_model=lambda: base(IDS))
    else:
        config.lora_ga_config = LoraGAConfig(**options)
        preprocess_loraga(base, config, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    return peft.get_peft_model(base, config)


def train(model):
    """As PEFT's and ours are trained: every trained tensor is moved a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def base_left(model):
    """The state dict of the base as PEFT's model has it."""
    state = model.get_base_model().state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora_" not in name}


def save_start(model, directory):
    """As PEFT's documentation says: with a plain start in the configuration, else it would start anew when it reads it."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(directory)
    config.init_lora_weights = init


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_start_is_pefts(case, variant):
    """CorDA: the same s B A, and A and B but for how its size is shared out. LoRA-GA: the same A and B, up to signs."""
    start, match = tiny.build("llama"), theirs(case, tiny.build("llama"), **variant)
    inject(start, LoraConfig(**{**SETTINGS, **variant}))
    CASES[case][2](start)
    layers = [(path, m) for path, m in start.named_modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 4
    for path, layer in layers:
        other = match.base_model.model.get_submodule(path)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        A_peft, B_peft = other.lora_A["default"].weight, other.lora_B["default"].weight
        assert layer.lora_scaling["default"] == pytest.approx(other.scaling["default"])
        if case == "lora_ga":
            torch.testing.assert_close(A.abs(), A_peft.abs(), rtol=0, atol=1e-5)
            # PEFT's randomised SVD looks for 4 r directions, which are all that there are. B is some 1e-4.
            torch.testing.assert_close(B.abs(), B_peft.abs(), rtol=0, atol=1e-4 * B_peft.abs().max().item())
        else:
            # PEFT works in float32, where C^-1 rounds by its condition, some thousand times 6e-8.
            torch.testing.assert_close(B @ A, B_peft @ A_peft, rtol=0, atol=1e-5)
            shared = A.norm() / A_peft.norm()
            torch.testing.assert_close(A.abs() / shared, A_peft.abs(), rtol=0, atol=2e-3 * A_peft.abs().max().item())
            torch.testing.assert_close(B.abs() * shared, B_peft.abs(), rtol=0, atol=2e-3 * B_peft.abs().max().item())
        residual = layer.weight - layer.lora_scaling["default"] * B @ A
        if case != "lora_ga":  # whose product has a sign of its own in each pair
            torch.testing.assert_close(residual, other.base_layer.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiny.logits(start), tiny.logits(match.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_our_file(case, tmp_path):
    model = tiny.build("llama")
    inject(model, LoraConfig(**SETTINGS))
    CASES[case][2](model)
    expected = tiny.logits(train(model))
    save_adapter(model, tmp_path)
    found = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    torch.testing.assert_close(tiny.logits(found), expected, rtol=0, atol=1e-5)
    assert (tiny.logits(tiny.build("llama")) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_what_peft_has_converted_loads(case, tmp_path):
    model = theirs(case, tiny.build("llama"))
    save_start(model, tmp_path / "start")
    expected = tiny.logits(train(model))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path / "plain")
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_has_not_converted_is_with_the_start(case, tmp_path):
    model = theirs(case, tiny.build("llama"))
    save_start(model, tmp_path / "start")
    expected = tiny.logits(train(model))
    model.save_pretrained(tmp_path / "trained")
    convert_adapter(tmp_path / "trained", tmp_path / "plain", plain=True, initial=tmp_path / "start")
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path / "plain")
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_on_the_base_that_training_left_it_is_loaded_as_it_is(case, tmp_path):
    model = theirs(case, tiny.build("llama"))
    expected = tiny.logits(train(model))
    model.save_pretrained(tmp_path / "trained")
    base = tiny.build("llama")
    before = tiny.snapshot(base)
    with pytest.raises(WrongBaseError, match=r"changed the base too.*convert --plain --initial.*strict=False") as caught:
        load_adapter(base, tmp_path / "trained")
    assert "\n" not in str(caught.value) and tiny.snapshot(base) == before
    base.load_state_dict(base_left(model))
    with pytest.warns(UserWarning, match="this one is taken for that") as warned:
        load_adapter(base, tmp_path / "trained", strict=False)
    assert warned[0].filename == __file__
    torch.testing.assert_close(tiny.logits(base), expected, rtol=0, atol=1e-5)
    with pytest.raises(FileFormatError, match="convert --plain --initial"):  # a merge over files has no such argument
        read_updates(tmp_path / "trained")


def test_eva_of_peft_loads_with_and_without_a_conversion(tmp_path):
    from peft.tuners.lora.config import EvaConfig

    config = peft.LoraConfig(**SETTINGS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = peft.get_peft_model(tiny.build("llama"), config, low_cpu_mem_usage=True)
    ids = torch.randint(0, 99, (16, 24), generator=torch.Generator().manual_seed(0))
    peft.initialize_lora_eva_weights(model, [{"input_ids": row[None]} for row in ids], show_progress_bar=False)
    train(model).save_pretrained(tmp_path)
    expected = tiny.logits(model)
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=0, atol=1e-5)


# --- LoftQ --------------------------------------------------------------------------------------------------------------


WIDE = (64, 128)


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*WIDE), nn.Tanh(), nn.Linear(*WIDE[::-1])).eval()


def loftq(monkeypatch, tmp_path, bits=4, rounds=1):
    """(PEFT's model with that start, trained, and its outputs); its files are in tmp_path. It asks for a GPU to quantise on."""
    bnb = pytest.importorskip("bitsandbytes")

    def on_cpu(to):
        def moved(tensor, *args, **kwargs):
            args = ["cpu" if arg == "cuda" else arg for arg in args]
            return to(tensor, *args, **{k: "cpu" if v == "cuda" else v for k, v in kwargs.items()})

        return moved

    with monkeypatch.context() as patched:
        for kind in (torch.Tensor, bnb.nn.Params4bit, bnb.nn.Int8Params):
            patched.setattr(kind, "to", on_cpu(kind.to))
        settings = {"loftq_bits": bits, "loftq_iter": rounds}
        config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="loftq", loftq_config=settings)
        model = train(peft.get_peft_model(wide(), config))
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(wide(), tmp_path).eval()
    x = torch.randn(5, WIDE[0], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-5)  # PEFT quantises the base again
    return model, x, expected


PACKERS = {4: lambda model: quantize_nf4(model, double_quant=False), 8: quantize_int8}


@pytest.mark.parametrize("bits", PACKERS)
def test_loftq_loads_onto_the_packed_base(bits, monkeypatch, tmp_path):
    _, x, expected = loftq(monkeypatch, tmp_path, bits)
    ours = wide()
    PACKERS[bits](ours)
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("bits", PACKERS)
def test_loftq_loads_onto_the_base_that_peft_left(bits, rounds, monkeypatch, tmp_path):
    model, x, expected = loftq(monkeypatch, tmp_path, bits, rounds)
    ours = wide()
    ours.load_state_dict(base_left(model))
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
        merge_and_unload(ours)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


def test_loftq_says_which_base_it_takes(monkeypatch, tmp_path):
    loftq(monkeypatch, tmp_path)
    dense, double, repacked = wide(), wide(), wide()
    quantize_nf4(double)
    quantize_nf4(repacked, double_quant=False)
    for base in (dense, double):
        before = tiny.snapshot(base)
        with pytest.raises(WrongBaseError, match=r"to nf4/64 in 1 rounds, and 0 does not hold.*double_quant=False"):
            load_adapter(base, tmp_path)
        assert tiny.snapshot(base) == before
    with pytest.warns(UserWarning, match="taken for that"):
        load_adapter(double, tmp_path, strict=False)
    with pytest.raises(FileFormatError, match="set it to true in adapter_config.json"):
        read_updates(tmp_path)
    with pytest.raises(FileFormatError, match="set it to true in adapter_config.json"):
        convert_adapter(tmp_path, tmp_path / "plain", plain=True, initial=tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    for settings, message in (({"loftq_bits": 4, "loftq_iter": 5}, "in 5 rounds"), ({"loftq_bits": 2}, "loftq_bits is 2")):
        file.write_text(json.dumps(fields | {"loftq_config": settings}))
        with pytest.raises(WrongBaseError, match=message):
            load_adapter(repacked, tmp_path)
