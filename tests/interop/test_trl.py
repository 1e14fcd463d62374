"""trl's trainers on a model with an adapter: supervised fine-tuning, and preferences against the base as the reference."""

import pytest
import torch
import torch.nn.functional as F

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from transformers import BitsAndBytesConfig, LlamaForCausalLM  # noqa: E402

from lora_core import LoraConfig, inject, load_adapter, trainable_parameters  # noqa: E402
from lora_core.integrations.trainer import AdapterCheckpoint, BaseAlone  # noqa: E402
from tests.support.language_models import small_llama  # noqa: E402

CONFIG = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
SHORT = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
SHORT |= {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 48}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("base"), tie_word_embeddings=False)


def adapted(base, packed=False):
    settings = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")} if packed else {}
    model = LlamaForCausalLM.from_pretrained(base, **settings)
    torch.manual_seed(0)
    inject(model, CONFIG)
    return model


def turn(role, content):
    return [{"role": role, "content": content}]


def values(model):
    return [p.detach().clone() for p in trainable_parameters(model)]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4 bits"])
def test_supervised_fine_tuning_goes_on_where_it_stopped(base, tmp_path, packed):
    rows = [{"prompt": turn("user", c * 3), "completion": turn("assistant", c * 2)} for c in "abcdefgh" * 2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def trainer(model, output):
        settings = trl.SFTConfig(str(output), completion_only_loss=True, **SHORT)
        made = trl.SFTTrainer(model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
        made.add_callback(AdapterCheckpoint(made))
        return made

    whole, model = adapted(base, packed), adapted(base, packed)
    first = trainer(whole, tmp_path)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(whole), strict=True))
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()


def test_preferences_are_learned_against_the_base(base, tmp_path):
    rows = [
        {"prompt": turn("user", c * 3), "chosen": turn("assistant", c), "rejected": turn("assistant", c.upper())}
        for c in "abcdefgh" * 2
    ]
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(base), adapted(base)
    settings = trl.DPOConfig(str(tmp_path), beta=0.1, **SHORT)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model, BaseAlone(model), settings, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(AdapterCheckpoint(trainer))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-3)  # the model is its reference: -log sigmoid(0)
    assert found[-1]["loss"] < 0.685 and found[-1]["rewards/margins"] > 0

    plain = LlamaForCausalLM.from_pretrained(base)
    fresh = LlamaForCausalLM.from_pretrained(base)
    load_adapter(fresh, tmp_path / "checkpoint-4")
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        policy, reference = (_log_probabilities(m, batch) for m in (fresh, plain))
    chosen, rejected = (policy - reference).chunk(2)  # rows of a batch: the chosen answers, then the rejected ones
    torch.testing.assert_close(loss, -F.logsigmoid(0.1 * (chosen - rejected)).mean(), rtol=0, atol=1e-4)


def _log_probabilities(model, batch):
    """The log-probability of each row's answer, by the book."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    each = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(-1)
