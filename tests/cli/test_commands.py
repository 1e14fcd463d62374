"""The command line as a user meets it: exit codes, one line for a mistake, JSON for machines, and the thin commands."""

import copy
import json
import math
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_core import LoraConfig, inject, load_adapter, merge_and_unload, quantize_nf4, save_adapter
from lora_core.__main__ import main
from lora_core.bases import dense_weight, is_packed
from lora_core.deploy.inspection import inspect_adapter
from lora_core.deploy.probe import PROBE_FILE, read_probe, run_probe, save_probe
from lora_core.deploy.recipe import choices
from lora_core.errors import ConfigError
from lora_core.files.storage import CONFIG_FILE, WEIGHTS_FILE, adapter_tensors
from tests.support import tiny

COMMANDS = ("inspect", "merge", "verify", "combine", "extract", "convert")
INPUTS = {"input_ids": tiny.TOKENS, "attention_mask": torch.ones_like(tiny.TOKENS)}


@pytest.fixture
def call(capfd):
    """Runs the command; returns (exit code, standard output, standard error)."""

    def run(*argv):
        capfd.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def made(directory, quantized=False, seed=3, **settings):
    """(adapted model, base directory, adapter directory with a probe)."""
    model = tiny.build("bert")
    if not (directory / "base").exists():
        model.save_pretrained(directory / "base")
    if quantized:
        quantize_nf4(model)
    config = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    inject(model, LoraConfig(**{**config, "base_model_name_or_path": str(directory / "base"), **settings}))
    tiny.randomize(model, seed=seed)
    adapter = directory / f"adapter{seed}"
    save_adapter(model, adapter)
    save_probe(model, adapter, INPUTS)
    return model.eval(), directory / "base", adapter


@pytest.fixture
def lora(tmp_path):
    return made(tmp_path)


def one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1


# --- the frame --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call, command):
    code, out, err = call(command, "--help")
    assert code == 0 and not err and "--json" in out and len(out.splitlines()) > 8


def test_it_is_a_process_of_its_own(lora):
    done = subprocess.run([sys.executable, "-m", "lora_core", "inspect", lora[2]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "effective rank" in done.stdout


def test_inspecting_and_merging_need_no_transformers(lora, tmp_path):
    code = "import sys; sys.modules['transformers'] = None\nfrom lora_core.__main__ import main\n"
    code += f"sys.exit(main(['merge', '--adapter', {str(lora[2])!r}, '--output', {str(tmp_path / 'out')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["mrge"], "invalid choice: 'mrge'"),
        (["inspect"], "the following arguments are required: ADAPTER"),
        (["inspect", "nowhere"], "nowhere is not a directory"),
        (["inspect", "ADAPTER", "--color"], "unrecognized arguments: --color"),
        (["merge", "--adapter", "ADAPTER"], "required: --output"),
        (["merge", "--adapter", "ADAPTER", "--output", "OUT", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["merge", "--adapter", "ADAPTER", "--output", "BASE"], "exists already"),
        (["merge", "--adapter", "ADAPTER", "--output", "OUT", "--base", "./nowhere"], "no directory, and no name of the Hub"),
        (["merge", "--adapter", "nowhere", "--output", "OUT", "--base", "BASE"], "nowhere is not a directory"),
        (["merge", "--adapter", "ADAPTER", "--output", "OUT", "--tolerance", "1"], "--tolerance is for --check"),
        (["merge", "--adapter", "ADAPTER", "--output", "OUT", "--check", "nofile"], "nofile can't be read"),
        (["merge", "--adapter", "ADAPTER", "--output", "OUT", "--weights", "1", "2"], "2 weights are given for 1"),
        (["combine", "--adapter", "ADAPTER", "--output", "OUT"], "give two or more adapters"),
        (["extract", "--tuned", "BASE", "--output", "OUT"], "name the base with --base"),
        (["convert", "ADAPTER", "--output", "OUT"], "say what to convert to"),
        (["convert", "ADAPTER", "--output", "OUT", "--plain"], "is plain LoRA already"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(call, lora, tmp_path, argv, says):
    places = {"ADAPTER": lora[2], "BASE": lora[1], "OUT": tmp_path / "out"}
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*(places.get(arg, arg) for arg in argv))
    assert code == 2 and not out and one_line(err) and says in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hub_that_is_out_of_reach_is_one_line(call, lora, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = call("merge", "--adapter", lora[2], "--base", "nobody/nothing", "--output", tmp_path / "out")
    assert code == 2 and one_line(err) and "not in the Hub's cache, and HF_HUB_OFFLINE is set" in err


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_norm_and_effective_rank_are_those_of_the_update(lora):
    model, _, adapter = lora
    found = inspect_adapter(adapter)
    assert len(found.layers) == 4 and not found.warnings and found.task == "SEQ_CLS"
    for view in found.layers:
        layer = model.get_submodule(view.path)
        D = (layer.lora_scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]).detach().double()
        sigma = torch.linalg.svdvals(D)
        share = sigma[:4] / sigma[:4].sum()
        assert view.norm == pytest.approx(D.norm().item(), rel=1e-5)
        assert view.effective_rank == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-4)
    assert found.parameters == sum(t.numel() for t in adapter_tensors(model).values())


def test_inspect_has_a_line_for_each_kind_of_module_and_all_has_each_layer(call, lora):
    layers = inspect_adapter(lora[2]).layers
    code, out, err = call("inspect", lora[2])
    assert code == 0 and not err and out.endswith("\n--all lists each of the 4 layers.\n")
    assert "|D|: how much the adapter changes a weight" in out and "effective rank: how many directions" in out
    assert not any(layer.path in out for layer in layers)
    for name in ("query", "value"):
        mine = [layer for layer in layers if layer.path.endswith(name)]
        (line,) = [line for line in out.splitlines() if line.startswith(f"bert.encoder.layer.*.attention.self.{name} ")]
        _, count, rank, scaling, norm, *bar, effective = line.split()
        assert (count, rank, scaling) == ("2", "4", f"{mine[0].scaling:.4g}") and set("".join(bar)) == {"#"}
        assert float(norm) == pytest.approx(sum(v.norm for v in mine) / 2, rel=1e-3)
        assert float(effective) == pytest.approx(sum(v.effective_rank for v in mine) / 2, abs=0.005)
    out = call("inspect", lora[2], "--all")[1]
    assert all(out.count(f"\n{layer.path} ") == 1 for layer in layers)


def test_inspect_as_json(call, lora):
    code, out, err = call("inspect", lora[2], "--json")
    found = json.loads(out)
    assert code == 0 and not err and out.count("\n") == 1
    assert found["base"] == str(lora[1]) and found["trained_on"] == "float32" and len(found["fingerprint"]) == 16
    assert found["layers"][0].keys() == {"path", "rank", "scaling", "norm", "effective_rank"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda name, t: t.zero_() if "lora_B" in name else t,
            "B A is zero in every layer: this adapter changes what it has whole",
        ),
        (lambda name, t: t.zero_() if "layer.0" in name and "lora_B" in name else t, "B A is zero in 2 of 4 layers"),
        (lambda name, t: t.fill_(math.nan) if "query.lora_A" in name else t, "NaN or infinite values in 2 places"),
        (lambda name, t: t.fill_(math.inf) if name.endswith("classifier.bias") else t, "such as classifier.bias"),
    ],
)
def test_inspect_warns(call, lora, spoil, says):
    path = lora[2] / WEIGHTS_FILE
    save_file({name: spoil(name, tensor) for name, tensor in load_file(path).items()}, path)
    code, out, _ = call("inspect", lora[2])
    assert code == 0 and out.startswith("warning: ") and says in out  # before anything else
    assert json.loads(call("inspect", lora[2], "--json")[1])["warnings"]


# --- merge and its check ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_a_merge_checks_itself_on_all_three_bases(call, tmp_path, quantized):
    _, _, adapter = made(tmp_path, quantized)
    code, out, err = call("merge", "--adapter", adapter, "--output", tmp_path / "out", "--check", "--json")
    assert code == 0 and not err
    found = json.loads(out)
    mine, *others = found["check"]
    assert mine["base_as"] == found["base_as"] == ("nf4-dequantized" if quantized else "original")
    assert {mine["base_as"], *(other["base_as"] for other in others)} == set(choices(["nf4"]))
    assert mine["relative"] < 1e-5 and mine["changed"] == 0 and max(mine["layers"].values()) < 1e-5
    for other in others:  # what folding into another base would have cost
        assert other["largest"] > 10 * mine["largest"] and max(other["layers"].values()) > 1e-2
    assert {path.name for path in tmp_path.iterdir()} == {"base", adapter.name, "out"}


def test_a_merge_that_fails_its_check_leaves_nothing(call, tmp_path):
    _, _, adapter = made(tmp_path, quantized=True)
    argv = (
        "merge",
        "--adapter",
        adapter,
        "--output",
        tmp_path / "out",
        "--base-as",
        "original",
        "--check",
        "--tolerance",
        "1e-4",
    )
    code, out, err = call(*argv)
    assert code == 1 and one_line(err) and "above the tolerance of 0.0001, so nothing was kept" in err
    assert out.count("logits off by at most") == 3
    assert json.loads(call(*argv, "--json")[1])["output"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"base", adapter.name}


def test_a_check_reads_texts(call, runs, tmp_path):
    from experiments.models import resolve

    (tmp_path / "texts").write_text("a delight\n\ndull beyond words, and far too long\n")
    argv = (
        "merge",
        "--base",
        resolve("packaged").directory,
        "--adapter",
        runs["lora"] / "adapter",
        "--output",
        tmp_path / "out",
    )
    code, out, err = call(*argv, "--check", tmp_path / "texts")
    assert code == 0 and not err and out.count("0.0% of labels changed") >= 1
    (tmp_path / "texts").write_text("\n")
    shutil.rmtree(tmp_path / "out")
    code, _, err = call(*argv, "--check", tmp_path / "texts")
    assert code == 2 and one_line(err) and "holds no text" in err


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_an_adapter_is_verified_on_its_base(call, tmp_path, quantized):
    _, _, adapter = made(tmp_path, quantized)
    assert read_probe(adapter).quantized == () if not quantized else len(read_probe(adapter).quantized) == 13
    code, out, err = call("verify", adapter)
    assert code == 0 and not err and out.endswith("verified\n"), (out, err)
    found = json.loads(call("verify", adapter, "--json")[1])
    assert found["passed"] and not found["drifted"] and found["relative"] < 1e-5 and found["inputs"] == 3


@pytest.mark.parametrize("known", [True, False], ids=["the run knew its padding", "nothing does"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_classifier_whose_base_names_no_padding_is_verified_and_merged(call, tmp_path, architecture, known):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind = {"gpt2": transformers.GPT2ForSequenceClassification, "llama": transformers.LlamaForSequenceClassification}
    config = copy.deepcopy(tiny.ARCHITECTURES[architecture][0])
    config.num_labels = 2
    torch.manual_seed(0)
    model = kind[architecture](config).eval()
    assert model.config.pad_token_id is None
    model.save_pretrained(base)
    targets = tiny.projections(architecture)
    inject(model, LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", base_model_name_or_path=str(base)))
    tiny.randomize(model, seed=3)
    ids, shown = tiny.TOKENS.clone(), torch.ones_like(tiny.TOKENS)
    ids[1, 5:], shown[1, 5:] = 1, 0
    alone = [model(input_ids=ids[i : i + 1, : shown[i].sum()]).logits for i in range(3)]
    if known:
        model.config.pad_token_id = 1
    save_adapter(model, adapter)
    save_probe(model, adapter, {"input_ids": ids, "attention_mask": shown})
    torch.testing.assert_close(read_probe(adapter).logits, torch.cat(alone).detach(), rtol=1e-4, atol=1e-5)
    code, out, err = call("verify", adapter)
    assert (code, err) == (0, "") and out.endswith("verified\n")
    code, out, err = call("merge", "--adapter", adapter, "--output", tmp_path / "out", "--check")
    assert code == 0 and "original         logits off by at most" in out, (out, err)


def test_inputs_without_tokens_are_run_at_once():
    model = tiny.build("vit")
    model.config.pad_token_id = None
    inputs = tiny.inputs(model)
    torch.testing.assert_close(run_probe(model, inputs), model(**inputs).logits.detach())


def drifted_base(base, adapter):
    tensors = load_file(base / "model.safetensors")
    save_file(
        {n: t * 1.5 if "query.weight" in n else t for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"}
    )


def drifted_adapter(base, adapter):
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({n: t * 2 for n, t in tensors.items()}, adapter / WEIGHTS_FILE, {"format": "pt"})


@pytest.mark.parametrize(("spoil", "what"), [(drifted_base, "base"), (drifted_adapter, "adapter")])
def test_verify_says_what_drifted(call, lora, spoil, what):
    _, base, adapter = lora
    spoil(base, adapter)
    code, out, _ = call("verify", adapter, "--base", base)
    assert code == 1 and f"{what}: " in out and out.endswith("NOT the model that was saved\n")
    assert json.loads(call("verify", adapter, "--json")[1])["drifted"].keys() == {what}


def test_verify_tells_a_changed_dtype_library_and_tokenizer(call, runs, tmp_path):
    from experiments.models import resolve

    base, adapter = resolve("packaged").directory, shutil.copytree(runs["lora"] / "adapter", tmp_path / "adapter")
    assert call("verify", adapter, "--base", base)[0] == 0
    found = json.loads(call("verify", adapter, "--base", base, "--dtype", "bfloat16", "--json")[1])
    assert found["drifted"].keys() == {"dtype"} and found["relative"] > 1e-4
    path = adapter / PROBE_FILE
    data = path.read_bytes()
    torch_version = version("torch").encode()
    assert torch_version in data
    path.write_bytes(data.replace(torch_version, b"9" * len(torch_version)))
    found = json.loads(call("verify", adapter, "--base", base, "--json")[1])
    assert found["passed"] and "torch 9" in found["drifted"]["library"]
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None  # no more lower case, nor stripped accents
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    tokenizer["model"]["vocab"] = dict(sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[0] != "film"))
    tokenizer["model"]["vocab"] |= {"film": 7}
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, out, _ = call("verify", adapter, "--base", base)
    assert code == 1 and "tokenizer: gives other tokens for" in out


def test_an_adapter_without_a_probe_or_with_a_broken_one_is_one_line(call, lora):
    path = lora[2] / PROBE_FILE
    save_file(load_file(path), path)
    code, _, err = call("verify", lora[2])
    assert code == 2 and one_line(err) and "not as written here" in err
    path.unlink()
    code, _, err = call("verify", lora[2])
    assert code == 2 and one_line(err) and "saved without probe inputs" in err


def test_a_probe_needs_logits_and_a_text_for_each_input(lora, tmp_path):
    model, _, adapter = lora
    with pytest.raises(ConfigError, match="2 texts are given for 3 inputs"):
        save_probe(model, adapter, INPUTS, ["a", "b"])
    with pytest.raises(ConfigError, match="gives no logits"):
        save_probe(model.bert, adapter, INPUTS)


# --- combine, extract, convert ----------------------------------------------------------------------------------------


def test_combined_adapters_add_up(call, tmp_path):
    (_, _, a), (_, _, b) = made(tmp_path, seed=3), made(tmp_path, seed=4)
    code, _, err = call("combine", "--adapter", a, "--adapter", b, "--weights", "0.5", "2", "--output", tmp_path / "both")
    assert code == 0 and not err
    found = {v.path: v for v in inspect_adapter(tmp_path / "both").layers}
    model = tiny.build("bert")
    for name, directory in (("a", a), ("b", b), ("both", tmp_path / "both")):
        load_adapter(model, directory, name)
    for path in found:
        D = {n: s * model.get_submodule(path).lora_B[n] @ model.get_submodule(path).lora_A[n]
             for n, s in model.get_submodule(path).lora_scaling.items()}  # fmt: skip
        torch.testing.assert_close(D["both"], 0.5 * D["a"] + 2 * D["b"], rtol=0, atol=1e-5)


def test_extracting_a_merged_adapter_gives_it_back(call, lora, tmp_path):
    model, base, adapter = lora
    assert call("merge", "--adapter", adapter, "--output", tmp_path / "tuned")[0] == 0
    argv = ("extract", "--base", base, "--tuned", tmp_path / "tuned", "--rank", "4", "--target-modules", "query", "value")
    code, _, err = call(*argv, "--task-type", "SEQ_CLS", "--output", tmp_path / "extracted")
    assert code == 0 and not err
    found = tiny.build("bert")
    load_adapter(found, tmp_path / "extracted")
    torch.testing.assert_close(tiny.logits(found), tiny.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_in_another_dtype(call, lora, tmp_path, dtype):
    code, out, err = call("convert", lora[2], "--dtype", dtype, "--output", tmp_path / "small")
    assert code == 0 and not err and dtype in out
    before, after = load_file(lora[2] / WEIGHTS_FILE), load_file(tmp_path / "small" / WEIGHTS_FILE)
    assert all(torch.equal(after[name], tensor.to(getattr(torch, dtype))) for name, tensor in before.items())
    load_adapter(tiny.build("bert"), tmp_path / "small")  # the fingerprint still says whose it is
    assert not (tmp_path / "small" / PROBE_FILE).exists()


def test_rank_stabilised_scaling_becomes_plain_exactly(call, tmp_path):
    model, _, adapter = made(tmp_path, use_rslora=True, rank_pattern={"layer.1.*value": 2}, alpha_pattern={"query": 3})
    assert call("convert", adapter, "--plain", "--output", tmp_path / "plain")[0] == 0
    assert not json.loads((tmp_path / "plain" / CONFIG_FILE).read_text())["use_rslora"]
    found = tiny.build("bert")
    load_adapter(found, tmp_path / "plain")
    torch.testing.assert_close(tiny.logits(found), tiny.logits(model), rtol=0, atol=1e-6)


def test_a_random_start_is_none_that_moved_the_base(call, tmp_path):
    _, _, adapter = made(tmp_path, use_rslora=True)
    file = adapter / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": False}))
    assert call("convert", adapter, "--plain", "--output", tmp_path / "plain")[0] == 0


def test_dora_becomes_the_nearest_plain_lora(call, tmp_path):
    model, base, adapter = made(tmp_path, use_dora=True)
    code, _, err = call("convert", adapter, "--plain", "--output", tmp_path / "plain")
    assert code == 2 and one_line(err) and "name it with --base" in err
    code, out, _ = call("convert", adapter, "--plain", "--base", base, "--rank", "32", "--output", tmp_path / "plain", "--json")
    assert code == 0 and min(json.loads(out)["energy"].values()) == pytest.approx(1)  # full rank: nothing is cut off
    found = tiny.build("bert")
    load_adapter(found, tmp_path / "plain")
    torch.testing.assert_close(tiny.logits(found), tiny.logits(model), rtol=0, atol=1e-5)
    out = call("convert", adapter, "--plain", "--base", base, "--output", tmp_path / "cut", "--json")[1]
    assert 0 < min(json.loads(out)["energy"].values()) < 1 and inspect_adapter(tmp_path / "cut").layers[0].rank == 4


def test_pissa_of_peft_becomes_plain_with_its_start(call, tmp_path):
    import peft

    base = tiny.build("bert")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.01
    model.save_pretrained(tmp_path / "trained")
    code, _, err = call("convert", tmp_path / "trained", "--plain", "--output", tmp_path / "plain")
    assert code == 2 and one_line(err) and "--initial" in err
    argv = ("convert", tmp_path / "trained", "--plain", "--initial", tmp_path / "start", "--output", tmp_path / "plain")
    assert call(*argv)[0] == 0
    found = tiny.build("bert")
    load_adapter(found, tmp_path / "plain")
    torch.testing.assert_close(tiny.logits(found), tiny.logits(model.eval()), rtol=0, atol=1e-5)


def test_a_directory_that_is_no_adapter_is_one_line(call, tmp_path):
    (tmp_path / "x").mkdir()
    code, _, err = call("convert", tmp_path / "x", "--plain", "--output", tmp_path / "y")
    assert code == 2 and one_line(err) and "an adapter directory holds" in err and not (tmp_path / "y").exists()


def test_merge_and_unload_can_keep_four_bits(tmp_path):
    model, _, _ = made(tmp_path, quantized=True)
    expected = tiny.logits(model)
    layer = model.bert.encoder.layer[0].attention.self.query
    exact = layer.folded_weight(["default"])
    update = layer.update_norm(["default"])
    report = merge_and_unload(model, requantize=True)
    query = model.bert.encoder.layer[0].attention.self.query
    assert is_packed(query) and len(report.requantized) == 13 and not report.dequantized
    path = "bert.encoder.layer.0.attention.self.query"
    assert report.layers[path] == pytest.approx(((dense_weight(query) - exact).norm() / update).item(), rel=1e-4)
    assert 0 < report.layers[path] < 2 and "13 layers packed" in str(report)
    assert (tiny.logits(model) - expected).abs().max() < 0.5 * expected.abs().max()


def test_another_tool_s_file_there_and_back(tmp_path, capsys):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "base")
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    base = ["--base", str(tmp_path / "base")]
    adapter, mlx, back = (str(tmp_path / name) for name in ("adapter", "mlx", "back"))
    assert main(["convert", adapter, "--to", "mlx", *base, "--output", mlx]) == 0
    assert main(["convert", mlx, *base, "--output", back, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["read"] == "MLX (mlx-lm)"
    assert main(["inspect", mlx]) == 0 and "format       MLX (mlx-lm)" in capsys.readouterr().out
    assert main(["inspect", mlx, "--for", "vllm"]) == 1 and "vllm refuses the format of MLX" in capsys.readouterr().out
    assert main(["inspect", back, "--for", "vllm"]) == 0 and f"vllm takes {back}" in capsys.readouterr().out
    assert main(["inspect", back, "--for", "llama.cpp", "--json"]) == 1
    assert "--to gguf" in json.loads(capsys.readouterr().out)["findings"][0]["mend"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "tflite"], "no format 'tflite'; there are peft, kohya"),
        (["--to", "mlx", "--plain"], "convert one after the other"),
        (["--to", "peft"], "has PEFT's format already"),
        (["--to", "torchtune"], "model_type is not known; name the base (--base)"),
        (["--lora-alpha", "4", "--to", "mlx"], "hints"),
    ],
)
def test_a_format_that_can_t_be_written_is_one_line(tmp_path, capsys, options, words):
    model = tiny.build("llama")
    inject(model, LoraConfig(r=4, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    assert main(["convert", str(tmp_path / "adapter"), *options, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
