"""Finding and loading a base for the checks: what is local needs no network, and every way to fail is one line."""

import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants

from lora_core.errors import FileFormatError, MissingDependencyError
from lora_core.integrations import packages, pretrained
from lora_core.integrations.pretrained import find_base, load_model, tokenize
from tests.support import tiny


@pytest.fixture
def hub(monkeypatch):
    """A Hub's client that finds nothing in its cache and does what `hub.fetch` says; `hub.answer` is what the Hub answers."""
    state = SimpleNamespace(fetch=lambda: None, answer=lambda: None, asked=0)

    def snapshot_download(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise FileNotFoundError(name)
        return state.fetch()

    def urlopen(request, timeout):
        state.asked += 1
        assert timeout <= 3
        state.answer()
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return state


def fail(error):
    def raising():
        raise error

    return raising


def test_a_directory_is_itself_and_asks_nobody(tmp_path, hub):
    assert find_base(str(tmp_path)) == tmp_path and not hub.asked


def test_a_model_of_the_hub_is_fetched(tmp_path, hub):
    hub.fetch = lambda: str(tmp_path)
    assert find_base("owner/name") == tmp_path and hub.asked == 1


def test_a_hub_that_answers_with_an_error_answers(tmp_path, hub):
    hub.fetch, hub.answer = lambda: str(tmp_path), fail(urllib.error.HTTPError("", 404, "", {}, None))
    assert find_base("owner/name") == tmp_path


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("no address"), urllib.error.URLError("refused")], ids=repr)
def test_a_hub_that_does_not_answer_is_not_waited_for(hub, error):
    hub.answer, hub.fetch = fail(error), lambda: pytest.fail("was asked for files")
    with pytest.raises(FileFormatError, match="no directory, not in the Hub's cache, and the Hub is out of reach"):
        find_base("owner/name")


def test_a_download_that_fails_is_one_line(hub):
    hub.fetch = fail(RuntimeError("the line\ndropped"))
    with pytest.raises(FileFormatError, match="'owner/name' could not be fetched: the line dropped"):
        find_base("owner/name")


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b/c", "a b", "a\\b", "~nobody/x", "a\0", "owner/name\n"])
def test_what_can_be_no_name_is_not_asked_for(hub, name):
    with pytest.raises(FileFormatError, match="is no directory, and no name of the Hub"):
        find_base(name)
    assert not hub.asked


def test_libraries_that_are_not_there_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="lora-core.hf."):
        find_base("owner/name")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="lora-core.hf."):
        load_model(tmp_path, None, torch.float32, strict=False)


def test_a_model_that_does_not_load_exactly_is_refused_if_it_must(tmp_path):
    transformers.BertModel(transformers.BertConfig(**tiny.SMALL)).save_pretrained(tmp_path)
    assert load_model(tmp_path, "SEQ_CLS", torch.float32, strict=False).classifier.weight.shape == (2, 32)
    with pytest.raises(FileFormatError, match=r"does not load exactly as AutoModelForSeq.*missing keys: classifier\.bias"):
        load_model(tmp_path, "SEQ_CLS", torch.float32, strict=True)


def test_a_class_or_a_tokenizer_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["OfNobody"]}')
    with pytest.raises(FileFormatError, match="its class 'OfNobody' is not known to this version"):
        load_model(tmp_path, None, torch.float32, strict=False)
    with pytest.raises(FileFormatError, match="has a tokenizer"):
        tokenize([tmp_path], ["fine"])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="the tokenizer in .* can't be loaded"):
        tokenize([tmp_path], ["fine"])


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, monkeypatch):
    found = {}

    class Tokenizer(SimpleNamespace):
        def __call__(self, texts, **options):
            found.update(options, texts=texts, pad=self.pad_token)
            return {}

    made = Tokenizer(pad_token_id=None, pad_token=None, eos_token="</s>", model_max_length=40)
    library = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=lambda *a, **k: made))
    monkeypatch.setattr(pretrained, "_transformers", lambda: library)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenize([tmp_path / "nowhere", tmp_path], ("a", "b"))
    assert (found["pad"], found["max_length"], found["texts"]) == ("</s>", 40, ["a", "b"])


def test_a_base_that_is_installed_as_a_package_needs_no_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "PACKAGES", {"owner/name": ("a_package", "model")})
    (tmp_path / "a_package" / "model").mkdir(parents=True)
    (tmp_path / "a_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_base("owner/name") == tmp_path / "a_package" / "model" and not hub.asked
    assert packages.packaged("owner/another") is None


def test_the_adapter_of_a_run_is_verified_without_naming_its_base(hub, runs, capsys):
    from lora_core.__main__ import main

    assert main(["verify", str(runs["lora"] / "adapter")]) == 0 and not hub.asked
