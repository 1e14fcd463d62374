"""Talking to a model: once, with the base beside it, in a conversation; and what is refused."""

import io
import sys

import pytest
import torch
import transformers

from experiments import chat, sft
from experiments.completions import Template
from experiments.conversations import Conversation
from lora_core import load_adapter
from tests.support.language_models import questions, small_llama


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The adapter of a run that learned to double a letter."""
    root = tmp_path_factory.mktemp("chat")
    base, data = small_llama(root / "base"), questions(root / "letters.jsonl")
    argv = ["--method", "lora", "--model", str(base), "--data", str(data), "--output-dir", str(root / "run")]
    settings = ["--epochs", "30", "--learning-rate", "1e-2", "--dropout", "0", "--batch-size", "5", "--max-length", "64"]
    assert sft.main([*argv, *settings, "--held-out", "4", "--device", "cpu", "--precision", "fp32"]) == 0
    return root / "run" / "adapter"


@pytest.fixture
def say(capsys, monkeypatch):
    """Runs the command with lines at its input, from a terminal or not; (exit code, output, errors)."""

    class Input(io.StringIO):
        terminal = False

        def isatty(self):
            return self.terminal

    def run(*argv, lines=(), terminal=False):
        given = Input("".join(line + "\n" for line in lines))
        given.terminal = terminal
        monkeypatch.setattr(sys, "stdin", given)
        capsys.readouterr()
        return chat.main(list(map(str, argv))), *capsys.readouterr()

    return run


def base_of(adapter):
    return adapter.parent.parent / "base"


def slowly(base, messages, tokens, adapter=None):
    """The answer without a cache, a token at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        load_adapter(model, adapter)
    ids = Template(tokenizer).prompt_ids(Conversation(tuple(messages), "", ""))
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_question_is_answered(say, adapter):
    assert say("--adapter", adapter, "aa", "c")[:2] == (0, "aa\ncc\n")
    assert say("--adapter", adapter, lines=["bb", "ddd"])[:2] == (0, "bb\ndd\n")


def test_the_base_s_answer_stands_beside(say, adapter):
    code, out, _ = say("--adapter", adapter, "--compare", "--max-new-tokens", "5", "aa")
    expected = slowly(base_of(adapter), [("user", "aa")], 5)
    assert code == 0 and out == f"adapter: aa\nbase:    {expected}\n"
    code, out, _ = say("--model", base_of(adapter), "--max-new-tokens", "5", "aa")
    assert (code, out) == (0, expected + "\n")


def test_in_a_conversation_what_was_said_is_seen(say, adapter):
    code, out, err = say(
        "--adapter", adapter, "--system", "s", "--max-new-tokens", "4", lines=["b", "", "c", "/new", "b"], terminal=True
    )
    start = [("system", "s"), ("user", "b")]
    first = slowly(base_of(adapter), start, 4, adapter)
    second = slowly(base_of(adapter), [*start, ("assistant", first), ("user", "c")], 4, adapter)
    assert code == 0 and "/new begins another" in err
    assert out.replace("> ", "") == f"{first}\n{second}\n{first}\n\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["hello"], "give --adapter"),
        (["--adapter", "a", "--merged", "b", "hello"], "give --adapter"),
        (["--merged", "b", "--compare", "hello"], "--compare needs --adapter"),
        (["--adapter", "nowhere", "hello"], "has no adapter_config.json"),
        (["--merged", "nowhere/else/", "hello"], "is no directory"),
        (["--adapter", "a", "--max-new-tokens", "0", "hello"], "--max-new-tokens must be at least 1"),
        (["--adapter", "a", " "], "text 1 is empty"),
    ],
)
def test_a_mistake_is_one_line(say, argv, says):
    code, out, err = say(*argv)
    assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1


def test_an_encoder_is_no_language_model(say, tmp_path):
    small_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.ViTForImageClassification(transformers.ViTConfig(**shape)).save_pretrained(tmp_path)
    code, _, err = say("--model", tmp_path, "hello")
    assert code == 2 and "can't be loaded as a causal language model" in err
