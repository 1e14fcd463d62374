"""Fine-tuning a language model: it learns, stops and goes on bit for bit, and shares its work among processes."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from experiments import sft, tuner
from experiments.chat import Speaker, main as chat
from experiments.generation import greedy
from tests.support.language_models import questions, small_llama
from tests.support.processes import finish, metrics_of, start, trained, whole_run

SHORT = [
    "--batch-size",
    "5",
    "--epochs",
    "2",
    "--max-length",
    "64",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--held-out",
    "4",
]


IN_BF16 = ["--method", "lora", "--precision", "bf16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return questions(tmp_path_factory.mktemp("data") / "letters.jsonl")


@pytest.fixture
def call(base, data, tmp_path, capfd, monkeypatch):
    """Runs the command, told to stop while it does a step if one is given; (exit code, output, errors)."""
    step_as_it_is = tuner.CompletionTrainer.training_step

    def run(*more, output="out", stop_at=None):
        def training_step(self, *args):
            if self.state.global_step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_as_it_is(self, *args)

        monkeypatch.setattr(tuner.CompletionTrainer, "training_step", training_step)
        capfd.readouterr()
        argv = ["--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / output), *SHORT, *more]
        return sft.main(argv), *capfd.readouterr()

    return run


def test_a_model_learns_to_answer_and_says_how_well(call, tmp_path, base):
    settings = ["--method", "lora", "--epochs", "30", "--learning-rate", "1e-2", "--dropout", "0"]
    code, out, err = call(*settings)
    assert code == 0, err
    metrics = metrics_of(tmp_path / "out")
    assert metrics["exact_match_before"] == 0 and metrics["exact_match"] == 1 == metrics["exact_match_by_epoch"][-1]
    assert metrics["loss"] < metrics["loss_before"] - 1 and len(metrics["exact_match_by_epoch"]) == 30
    assert metrics["data"]["train"] == 20 and metrics["tokens_per_second"] > 0
    assert "untrained: 0.0% of the held-out answers are exact" in out and "lora: 100.0% of 4 held-out" in out
    command = out.split(" -m experiments.chat ")[1].split()
    assert command[:3] == ["--adapter", str(tmp_path / "out" / "adapter"), "--compare"]
    assert "holds this very run already: exact match 100.0%" in call(*settings)[1]
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM" and adapter["base_model_name_or_path"] == str(base)
    probe = load_file(tmp_path / "out" / "adapter" / "probe.safetensors")
    assert len(probe["logits"]) == 4


def test_peft_gives_the_same_answers(call, tmp_path, base, capfd):
    peft = pytest.importorskip("peft")
    assert call("--method", "lora", "--learning-rate", "1e-2", "--epochs", "6")[0] == 0
    adapter = tmp_path / "out" / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), adapter).eval()
    capfd.readouterr()
    assert chat(["--adapter", str(adapter), "--max-new-tokens", "6", "bb", "ccc"]) == 0
    for question, answer in zip(("bb", "ccc"), capfd.readouterr().out.splitlines(), strict=True):
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == answer


def test_chat_computes_in_what_the_run_did(call, tmp_path, monkeypatch):
    asked = []  # (prompts, tokens, answers) of each evaluation
    monkeypatch.setattr(tuner, "greedy", lambda *args: asked.append((*args[2:], greedy(*args))) or asked[-1][-1])
    code, out, err = call(*IN_BF16, "--learning-rate", "1e-2", "--epochs", "6")
    assert code == 0 and "15 layers held in bfloat16" in out, err
    speaker = Speaker(tmp_path / "out" / "adapter", None, None, compare=False, tokens=8)
    weights = {name: p.dtype for name, p in speaker.model.named_parameters() if "lora_" not in name}
    assert all((dtype == torch.bfloat16) == ("proj" in name or "lm_head" in name) for name, dtype in weights.items())
    prompts, tokens, answers = asked[-1]
    assert len(set(answers)) > 1
    with speaker.computing:
        assert greedy(speaker.model, speaker.template.tokenizer, prompts, tokens) == answers
    assert call("--method", "full", "--precision", "bf16", output="full")[0] == 0
    whole = Speaker(None, None, tmp_path / "full" / "model", compare=False, tokens=8)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    with whole.computing:
        assert greedy(whole.model, whole.template.tokenizer, *asked[-1][:2]) == asked[-1][2]


def test_the_untrained_model_is_judged_in_the_precision_that_was_asked_for(call, tmp_path):
    assert call(*IN_BF16, "--max-steps", "1")[0] == 0
    losses = {}
    for kind in ("bf16", "fp32"):
        code, _, err = call("--method", "base", "--precision", kind, output=kind)
        assert code == 0, err
        losses[kind] = metrics_of(tmp_path / kind)["loss"]
    assert losses["bf16"] == metrics_of(tmp_path / "out")["loss_before"] != losses["fp32"]


@pytest.mark.parametrize("more", [["--method", "qlora"], ["--method", "dora", "--packing"], ["--method", "full"], IN_BF16])
def test_a_stopped_run_ends_as_one_that_was_not(call, tmp_path, more):
    assert call(*more, output="whole")[0] == 0
    code, _, err = call(*more, stop_at=3)
    assert code == 143 and "step 3 is done and saved as" in err and "-m experiments.sft " in err and "--resume" in err
    code, out, err = call(*more, "--resume", stop_at=6)
    assert code == 143 and "going on from step 3" in out
    code, out, err = call(*more, "--resume")
    assert code == 0, err
    assert whole_run(tmp_path / "out") == whole_run(tmp_path / "whole")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base(call, tmp_path):
    assert call("--method", "lora", stop_at=2)[0] == 143
    (path,) = (tmp_path / "out" / "checkpoints").iterdir()
    tensors = load_file(path / "tensors.safetensors")
    assert all("lora_" in name for name in tensors if name.startswith("model."))
    values = sum(t.numel() for name, t in tensors.items() if name.startswith("model."))
    moments = sum(t.numel() for name, t in tensors.items() if "exp_avg" in name)
    assert moments == 2 * values


def test_packing_and_checkpointing_change_the_speed_alone(call, tmp_path):
    """Without dropout the gradients are those of the padded batch, but for rounding."""
    same = ["--method", "lora", "--dropout", "0"]
    assert call(*same, output="plain")[0] == 0
    for name in ("packing", "gradient-checkpointing"):
        assert call(*same, f"--{name}", output=name)[0] == 0
        expected = trained(tmp_path / "plain")
        for key, tensor in trained(tmp_path / name).items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-4)
        assert metrics_of(tmp_path / name)["hyperparameters"][name.replace("-", "_")] is True


def test_the_loss_without_logits_changes_nothing(call, tmp_path, monkeypatch):
    """With dropout: its masks are drawn in the same order."""
    calls, summed = [], tuner.summed_cross_entropy
    monkeypatch.setattr(tuner, "summed_cross_entropy", lambda *args: calls.append(1) or summed(*args))
    assert call("--method", "lora", output="blocks")[0] == 0
    made = len(calls)
    monkeypatch.setattr(tuner.FrozenHead, "inputs", lambda *_, **__: None)  # as of a model that caps its logits
    assert call("--method", "lora", output="logits")[0] == 0
    assert made == len(calls) > 10
    expected, found = (metrics_of(tmp_path / name) for name in ("logits", "blocks"))
    assert np.allclose(found["loss_history"], expected["loss_history"], rtol=1e-5)
    for key, tensor in trained(tmp_path / "blocks").items():
        torch.testing.assert_close(tensor, trained(tmp_path / "logits")[key], rtol=0, atol=2e-4)


def test_two_processes_learn_what_one_does(call, base, data, tmp_path):
    same = ["--method", "lora", "--dropout", "0"]
    assert call(*same)[0] == 0
    argv = ["--model", base, "--data", data, "--output-dir", tmp_path / "two", *SHORT, *same]
    code, output = finish(start(*argv, count=2, module="experiments.sft"))
    assert code == 0, output
    expected = trained(tmp_path / "out")
    for key, tensor in trained(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-4)
    assert metrics_of(tmp_path / "two")["loss"] == pytest.approx(metrics_of(tmp_path / "out")["loss"], abs=1e-3)


def test_what_is_learned_without_an_adapter_is_a_model(call, tmp_path, capfd):
    assert call("--method", "full")[0] == 0
    assert not (tmp_path / "out" / "adapter").exists()
    assert chat(["--merged", str(tmp_path / "out" / "model"), "--max-new-tokens", "2", "aa"]) == 0
    code, out, _ = call("--method", "base", output="base")
    assert code == 0 and "base: 0.0% of 4 held-out answers are exact; peak" in out
    assert metrics_of(tmp_path / "base")["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-length", "8"], "and 8 are read; shorten it or raise --max-length"),
        (["--max-length", "999"], "max_length is 999, and this model reads at most 256 tokens"),
        (["--train-samples", "21"], "train_samples is 21, and there are 20 rows to train on"),
        (["--held-out", "24"], "has 24 rows; 24 can't be held out"),
        (["--method", "full", "--rank", "4"], "--method full has no adapter"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (["--resume", "--overwrite"], "leave one out"),
        (["--learning-rate", "1e30"], "training diverged"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(call, tmp_path, more, says):
    code, _, err = call(*more)
    assert code == 2 and says in err and err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_model_that_takes_no_positions_can_t_be_packed(call, tmp_path):
    shape = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "bos_token_id": 257, "eos_token_id": 257}
    directory = tmp_path / "bloom"
    small_llama(directory)
    (directory / "model.safetensors").unlink()
    transformers.BloomForCausalLM(transformers.BloomConfig(**shape)).save_pretrained(directory)
    code, _, err = call("--method", "lora", "--model", str(directory), "--packing", "--target-modules", "query_key_value")
    assert code == 2 and "--packing: BloomForCausalLM takes no position_ids" in err
    code, _, err = call("--method", "lora", "--model", str(directory), "--target-modules", "query_key_value")
    assert code == 0, err
