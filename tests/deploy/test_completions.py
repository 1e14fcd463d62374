"""Greedy completions against transformers' own, and how a language model is judged by them: verify, merge --check, probes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_core import LoraConfig, inject, save_adapter, save_probe
from lora_core.__main__ import main
from lora_core.deploy.completions import ABSENT, complete, outputs
from lora_core.deploy.probe import PROBE_FILE, read_probe
from lora_core.errors import FileFormatError
from lora_core.files.disk import read_safetensors
from tests.support import tiny
from tests.support.language_models import build, small_llama

PROMPTS = [torch.arange(5, 9), torch.arange(20, 31), torch.tensor([7])]


@pytest.mark.parametrize("name", ["llama", "gpt2, tied", "opt, tied"])
def test_completions_are_those_of_generate(name):
    model = build(name)
    said = complete(model, PROMPTS, 9)
    for row, (prompt, logits) in enumerate(zip(PROMPTS, outputs(model, PROMPTS, said.tokens), strict=True)):
        expected = model.generate(prompt[None], max_new_tokens=9, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        tokens, likeliest = said[row]
        assert tokens == expected.tolist()
        assert all(max(one, key=one.get) == token for one, token in zip(likeliest, tokens, strict=True))
        best = logits.log_softmax(-1).topk(5)  # one by one, without padding
        torch.testing.assert_close(said.logprobs[row, : len(tokens)], best.values, rtol=0, atol=1e-5)


def test_an_answer_ends_where_it_ends_and_where_the_model_can_read_no_more():
    model = build("gpt2, tied")
    first = complete(model, PROMPTS[:1], 4).tokens[0]
    model.generation_config.eos_token_id = int(first[2])
    said = complete(model, PROMPTS, 9)
    where = first.tolist().index(int(first[2]))
    assert said.tokens[0, : where + 1].tolist() == first[: where + 1].tolist()
    assert (said.tokens[0, where + 1 :] == ABSENT).all() and len(said[0][0]) == where + 1
    long = complete(model, [torch.arange(60)], 9)  # of 64 places
    assert long.tokens.shape[1] <= 5


@pytest.fixture
def place(tmp_path):
    base = small_llama(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    save_adapter(tiny.randomize(model), tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    texts = ["<|user|>aa<|end|><|assistant|>", "<|user|>what?<|end|><|assistant|>"]
    save_probe(model, tmp_path / "adapter", tokenizer(texts, padding=True, return_tensors="pt"), texts, tokenizer)
    return tmp_path


def test_a_language_model_is_verified_by_its_answers(place, capsys):
    argv = ["verify", str(place / "adapter"), "--base", str(place / "base")]
    assert main(argv) == 0
    assert "0.0% of answers changed" in capsys.readouterr().out
    tensors = load_file(place / "base" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].flip(0) * torch.linspace(-3, 3, 64)
    save_file(tensors, place / "base" / "model.safetensors", {"format": "pt"})
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "% of answers changed" in out and "prompt 0: token 0 is" in out and "NOT the model that was saved" in out


def test_a_merge_is_checked_by_answers_to_questions_as_the_template_writes_them(place, capsys, monkeypatch):
    from lora_core.deploy import check

    seen, greedy = [], check.greedy
    monkeypatch.setattr(check, "greedy", lambda model, prompts, size: seen.extend(prompts) or greedy(model, prompts, size))
    (place / "questions").write_text("aa\nbb\n")
    argv = ["merge", "--base", place / "base", "--adapter", place / "adapter", "--output", place / "merged"]
    assert main([*map(str, argv), "--check", str(place / "questions")]) == 0
    assert "0.0% of answers changed" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    assert [tokenizer.decode(ids) for ids in seen] == [f"<|user|>{q}<|end|><|assistant|>" for q in ("aa", "bb")]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("adapter.tokens", lambda t: t[:, :3]),
        ("adapter.tokens", lambda t: t.float()),
        ("base.tokens", lambda t: t[:1]),
        ("base.tokens", lambda t: t - 10**6),
        ("adapter.likeliest", lambda t: t.flatten()),
        ("adapter.likeliest", lambda t: -t - 1),
        ("base.logprobs", lambda t: t / 0),
        ("adapter.logprobs", lambda t: None),
        ("adapter.tokens", lambda t: t + 10**6),
    ],
)
def test_a_probe_whose_completions_are_broken_is_one_line(place, name, spoil, capsys):
    path = place / "adapter" / PROBE_FILE
    tensors, metadata = read_safetensors(path)
    spoiled = spoil(tensors.pop(name))
    save_file(tensors | ({} if spoiled is None else {name: spoiled.contiguous()}), path, metadata)
    assert main(["verify", str(place / "adapter"), "--base", str(place / "base")]) == 2
    error = capsys.readouterr().err
    assert "save the adapter and its probe again" in error and error.count("\n") == 1


def test_a_probe_holds_what_is_said_without_the_adapter_and_the_texts(place):
    probe = read_probe(place / "adapter")
    assert not torch.equal(probe.adapter.logprobs, probe.base.logprobs)
    assert {token for token in probe.adapter.tokens.flatten().tolist() if token != ABSENT} <= probe.pieces.keys()
    (place / "adapter" / PROBE_FILE).write_bytes(b"")
    with pytest.raises(FileFormatError):
        read_probe(place / "adapter")
