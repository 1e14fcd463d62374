"""Ways to spoil the files of an adapter, each with the error and the words of its refusal."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from lora_core.errors import (
    FileFormatError,
    LoraError,
    TargetError,
    WrongBaseError,
)
from lora_core.files.storage import CONFIG_FILE, WEIGHTS_FILE

ANY_LAYER = {"layers_to_transform": None, "layers_pattern": None}


def edit_config(directory, **changes):
    fields = json.loads((directory / CONFIG_FILE).read_text())
    fields.update(changes)
    (directory / CONFIG_FILE).write_text(json.dumps({k: v for k, v in fields.items() if v != "REMOVED"}))


def edit_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / WEIGHTS_FILE, metadata={"format": "pt"})


KEY = "base_model.model.layers.0.q.lora_A.weight"


def drop(key):
    return lambda d: edit_tensors(d, lambda t: t.pop(key))


def put(key, tensor):
    return lambda d: edit_tensors(d, lambda t: t.__setitem__(key, tensor))


def truncate(fraction):
    def spoil(directory):
        path = directory / WEIGHTS_FILE
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * fraction)] if isinstance(fraction, float) else data[:fraction])

    return spoil


def write_config(text):
    return lambda d: (d / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())


BAD = {
    "a tensor is missing": (drop(KEY), FileFormatError, f"1 missing tensors \\({KEY}"),
    "a head's tensor is missing": (
        drop("base_model.model.classifier.bias"),
        FileFormatError,
        "1 missing.*classifier.bias",
    ),
    "a tensor too many": (
        put(KEY.replace("q", "zz"), torch.zeros(2)),
        FileFormatError,
        "1 tensors without a home.*zz",
    ),
    "another rank": (put(KEY, torch.zeros(5, 64)), FileFormatError, r"1 wrong shapes .*\(5, 64\), not \(4, 64\)"),
    "another width": (put(KEY, torch.zeros(4, 63)), FileFormatError, r"\(4, 63\), not \(4, 64\)"),
    "transposed": (put(KEY, torch.zeros(64, 4)), FileFormatError, r"\(64, 4\), not \(4, 64\)"),
    "one axis too many": (put(KEY, torch.zeros(4, 64, 1)), FileFormatError, r"\(4, 64, 1\)"),
    "NaN": (
        put(KEY, torch.full((4, 64), float("nan"))),
        FileFormatError,
        f"NaN or infinite values in 1 tensors \\({KEY}",
    ),
    "infinite": (put(KEY, torch.full((4, 64), float("inf")).half()), FileFormatError, "NaN or infinite"),
    "integers": (put(KEY, torch.ones(4, 64, dtype=torch.int64)), FileFormatError, "int64"),
    "8-bit floats": (put(KEY, torch.zeros(4, 64, dtype=torch.float8_e4m3fn)), FileFormatError, "float8"),
    "bools": (put(KEY, torch.ones(4, 64, dtype=torch.bool)), FileFormatError, "bool"),
    "head of integers": (
        put("base_model.model.classifier.weight", torch.ones(3, 64, dtype=torch.int32)),
        FileFormatError,
        "int32",
    ),
    "weights file empty": (truncate(0), FileFormatError, "not a whole safetensors file"),
    "header length cut": (truncate(7), FileFormatError, "not a whole safetensors file"),
    "header cut": (truncate(40), FileFormatError, "not a whole safetensors file"),
    "data cut in half": (truncate(0.5), FileFormatError, "not a whole safetensors file"),
    "last byte cut": (truncate(-1), FileFormatError, "not a whole safetensors file"),
    "weights are text": (
        lambda d: (d / WEIGHTS_FILE).write_text("hello, world"),
        FileFormatError,
        "not a whole safetensors",
    ),
    "weights missing": (
        lambda d: (d / WEIGHTS_FILE).unlink(),
        FileFormatError,
        "adapter_model.safetensors is not there",
    ),
    "weights are a directory": (
        lambda d: ((d / WEIGHTS_FILE).unlink(), (d / WEIGHTS_FILE).mkdir()),
        FileFormatError,
        "is a directory",
    ),
    "config missing": (
        lambda d: (d / CONFIG_FILE).unlink(),
        FileFormatError,
        "adapter_config.json is not there",
    ),
    "config empty": (write_config(""), FileFormatError, "is not JSON"),
    "config cut": (write_config('{"r": 4,'), FileFormatError, "is not JSON"),
    "config not UTF-8": (write_config(b"\xff\xfe{}"), FileFormatError, "is not JSON"),
    "config too deep": (write_config("[" * 100_000), FileFormatError, "is not JSON"),
    "config a list": (write_config("[]"), FileFormatError, "peft_type is 'list'"),
    "config of another method": (lambda d: edit_config(d, peft_type="IA3"), FileFormatError, "peft_type is 'IA3'"),
    "no method": (lambda d: edit_config(d, peft_type="REMOVED"), FileFormatError, "peft_type is None"),
    "no rank, and not the usual one": (lambda d: edit_config(d, r="REMOVED"), FileFormatError, r"\(4, 64\), not \(8, 64\)"),
    "an empty rank": (lambda d: edit_config(d, r=None), FileFormatError, "r must be a positive integer, not None"),
    "an empty alpha": (lambda d: edit_config(d, lora_alpha=""), FileFormatError, "lora_alpha must be a positive number"),
    "no targets": (lambda d: edit_config(d, target_modules=None), TargetError, "target_modules is not set.*no architecture"),
    "rank zero": (lambda d: edit_config(d, r=0), FileFormatError, "r "),
    "rank as text": (lambda d: edit_config(d, r="4"), FileFormatError, "r must be a positive integer, not '4'"),
    "rank true": (lambda d: edit_config(d, r=True), FileFormatError, "r must be a positive integer"),
    "alpha zero": (lambda d: edit_config(d, lora_alpha=0), FileFormatError, "lora_alpha"),
    "alpha NaN": (lambda d: edit_config(d, lora_alpha=float("nan")), FileFormatError, "lora_alpha"),
    "unknown bias mode": (lambda d: edit_config(d, bias="some"), FileFormatError, "bias must be one of"),
    "broken pattern": (
        lambda d: edit_config(d, target_modules="(", **ANY_LAYER),
        FileFormatError,
        "regular expression",
    ),
    "DoRA": (lambda d: edit_config(d, use_dora=True), FileFormatError, r"4 missing tensors \(.*lora_magnitude_vector"),
    "bias on B": (lambda d: edit_config(d, lora_bias=True), FileFormatError, r"4 missing tensors \(.*lora_B\.bias"),
    "target parameters": (lambda d: edit_config(d, target_modules=[], target_parameters=["w"]), FileFormatError, "match no"),
    "a new field": (lambda d: edit_config(d, use_magic=1), FileFormatError, "has use_magic=1, unknown here"),
    "CorDA": (lambda d: edit_config(d, init_lora_weights="corda"), WrongBaseError, "corda.*changed the base"),
    "LoftQ": (lambda d: edit_config(d, init_lora_weights="loftq"), WrongBaseError, "loftq"),
    "other layers": (lambda d: edit_config(d, layers_to_transform=[0]), FileFormatError, "without a home"),
    "another base": (
        lambda d: edit_config(d, target_modules=["q_proj"], rank_pattern={}),
        FileFormatError,
        "match no layer",
    ),
    "a head that is not there": (
        lambda d: edit_config(d, modules_to_save=["head"]),
        FileFormatError,
        "without a home",
    ),
    "a target that is not linear": (lambda d: edit_config(d, target_modules=["q", "v", "norm"]), LoraError, "norm"),
    "nothing": (lambda d: shutil.rmtree(d), FileFormatError, "is not a directory"),
}
