"""Files are data: nothing in them is run, nothing outside of a directory that was named is read or written."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

from experiments import models, predict, sst2
from experiments.errors import ExperimentError
from lora_core import LoraConfig, LoraError, inject, load_adapter, save_adapter
from lora_core.__main__ import main
from lora_core.errors import FileFormatError
from lora_core.files.storage import CONFIG_FILE, WEIGHTS_FILE, adapter_tensors
from lora_core.integrations.pretrained import load_model, tokenize
from tests.support import ROOT, tiny

SOURCES = sorted(path for package in ("lora_core", "experiments") for path in (ROOT / package).rglob("*.py"))
EVERY_SOURCE = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))

#: What runs code that it is given, or undoes a pickle, which does. (`re.compile` is another thing.)
RUNNING = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.hub.load"}
RUNNING |= {"yaml.load", "numpy.load", "np.load", "runpy.run_path"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "runpy", "imp"}


def calls(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@EVERY_SOURCE
def test_nothing_is_unpickled_or_evaluated(path):
    tree = ast.parse(path.read_text())
    running = [call for call in calls(path) if ast.unparse(call.func) in RUNNING]
    if path.name == "pickled.py":  # the one that may, and only so
        running = [call for call in running if ast.unparse(call.func) != "torch.save"]
        assert [ast.unparse(call) for call in running] == ["torch.load(file, map_location='cpu', weights_only=True)"]
        running = []
    assert not running
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & MODULES
    given = {(k.arg, k.value.value) for call in calls(path) for k in call.keywords if isinstance(k.value, ast.Constant)}
    assert not given & {("shell", True), ("weights_only", False), ("trust_remote_code", True)}


@EVERY_SOURCE
def test_models_are_loaded_without_code_of_their_own(path):
    for call in calls(path):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
            spread = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
            assert spread & {"LOCAL", "models.LOCAL"}, f"{path}:{call.lineno}"


def test_code_of_a_models_own_is_declined_and_not_asked_about():
    from lora_core.integrations import pretrained

    for settings in (models.LOCAL, pretrained.LOCAL):
        assert settings == {"local_files_only": True, "trust_remote_code": False}


@pytest.fixture
def booby_trapped(tmp_path):
    """A model's directory whose files name code beside them, which would leave a mark."""
    directory, mark = tmp_path / "model", tmp_path / "it-ran"
    transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.SMALL)).save_pretrained(directory)
    code = f"open({str(mark)!r}, 'w').close()\nclass Model: pass\nclass Config: pass\nclass Tokenizer: pass\n"
    (directory / "trap.py").write_text(code)
    config = json.loads((directory / "config.json").read_text())
    maps = {name: "trap.Model" for name in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")}
    config |= {"auto_map": maps | {"AutoConfig": "trap.Config", "AutoTokenizer": ["trap.Tokenizer", None]}}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "of-nobody"}))
    tokenizer = {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Tokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    yield directory
    assert not mark.exists()


def test_a_models_own_code_is_not_run(booby_trapped, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115  nobody is there to say yes
    with pytest.raises(ExperimentError, match="can't be loaded as a classifier"):
        models.load_classifier(models.resolve(str(booby_trapped)))
    with pytest.raises(FileFormatError, match="can't be loaded as"):
        load_model(booby_trapped, "SEQ_CLS", torch.float32, strict=False)
    with pytest.raises(FileFormatError, match="tokenizer in .* can't be loaded"):
        tokenize([booby_trapped], ["fine"])


@pytest.mark.parametrize("named", [5, {"a": 1}, "BertModel", [], ["os"], ["pipeline"], ["BertConfig"], [["x"]]], ids=str)
def test_a_class_that_is_no_models_is_not_called(tmp_path, named):
    transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": named}))
    try:
        assert isinstance(load_model(tmp_path, None, torch.float32, strict=False), torch.nn.Module)
    except LoraError as error:
        assert str(error).isprintable()


def pickled(directory):
    """A pickle that would run code, under the name of each file that is read."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(directory / "it-ran"),)

    torch.save(Trap(), directory / "pickle")
    return (directory / "pickle").read_bytes()


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE, "adapter_model.bin"])
def test_a_pickle_is_not_opened_whatever_its_name(tmp_path, name):
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"]))
    save_adapter(model, tmp_path / "adapter")
    if name == "adapter_model.bin":
        (tmp_path / "adapter" / WEIGHTS_FILE).unlink()
    (tmp_path / "adapter" / name).write_bytes(pickled(tmp_path))
    with pytest.raises(LoraError):
        load_adapter(tiny.classifier(), tmp_path / "adapter")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json"])
def test_a_base_of_pickles_is_not_opened(tmp_path, name, capfd):
    model = tiny.build("bert")
    model.save_pretrained(tmp_path / "base")
    inject(model, LoraConfig(target_modules=["query"]))
    save_adapter(model, tmp_path / "adapter")
    if name != "config.json":
        (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / name).write_bytes(pickled(tmp_path))
    base, adapter, output = (str(tmp_path / part) for part in ("base", "adapter", "out"))
    assert main(["merge", "--base", base, "--adapter", adapter, "--output", output]) == 2
    assert predict.main(["--model", base, "fine"]) == 2
    assert not (tmp_path / "it-ran").exists() and not (tmp_path / "out").exists()
    assert capfd.readouterr().err.count("error: ") == 2


# --- places -----------------------------------------------------------------------------------------------------------


def test_saving_replaces_a_link_and_not_what_it_points_to(tmp_path):
    """Who may put a link into the directory must not choose which file of ours is overwritten."""
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"]))
    (tmp_path / "adapter").mkdir()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / f"mine-{name}").write_text("mine")
        (tmp_path / "adapter" / name).symlink_to(tmp_path / f"mine-{name}")
    save_adapter(model, tmp_path / "adapter")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / f"mine-{name}").read_text() == "mine" and not (tmp_path / "adapter" / name).is_symlink()


def test_links_are_followed_when_reading_as_in_the_cache_of_the_hub(tmp_path):
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"]))
    save_adapter(tiny.randomize(model), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    loaded = tiny.classifier()
    load_adapter(loaded, tmp_path / "snapshot")
    assert all(torch.equal(t, adapter_tensors(loaded)[k]) for k, t in adapter_tensors(model).items())


def test_an_adapter_is_saved_in_its_directory_and_nowhere_else(tmp_path, monkeypatch):
    """Whatever it is called, and whatever its configuration says its base is."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = ["default", "a" * 128, "\u00e9\u4e2d", "a-b-c", "CON"]
    for name in names:
        model = tiny.classifier()
        inject(model, LoraConfig(target_modules=["q"], base_model_name_or_path="../../../etc/passwd"), name)
        save_adapter(model, "out", name)
        assert {p.name for p in (tmp_path / "work" / "out").iterdir()} == {WEIGHTS_FILE, CONFIG_FILE}
    assert [p.name for p in tmp_path.iterdir()] == ["work"] and os.listdir("..") == ["work"] and os.listdir() == ["out"]


@pytest.mark.parametrize("model", ["../../etc", "/etc/passwd", "a/../../b", "..", "~/../x", "a\\b", "\uff0e\uff0e/x"])
@pytest.mark.parametrize("data", ["Rotten Tomatoes", "../../x", "/etc", "a\0b\n"])
def test_the_default_place_of_results_is_one_directory_below_runs(model, data):
    plan = {"method": "lora", "data": {"name": data}, "base_model": {"name": model}, "seed": 0}
    place = sst2.default_output(plan)
    assert place.parent == Path("runs") and place.name not in ("", ".", "..") and place.name.startswith("lora-")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "x.txt", "a" * 300])
def test_an_index_names_only_files_beside_it(tmp_path, name, capfd):
    model = tiny.build("bert")
    model.save_pretrained(tmp_path / "base")
    inject(model, LoraConfig(target_modules=["query"]))
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {key: name for key in model.state_dict() if "lora" not in key}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    base, adapter, output = (str(tmp_path / part) for part in ("base", "adapter", "out"))
    assert main(["merge", "--base", base, "--adapter", adapter, "--output", output]) == 2
    assert "only a *.safetensors file beside the index may be named" in capfd.readouterr().err
