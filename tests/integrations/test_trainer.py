"""transformers' Trainer on a model with an adapter: 4-bit bases, checkpoints without the base, what it does to the forward."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from lora_core import (  # noqa: E402
    LoraConfig,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.errors import AdapterNameError, LoraError, StateError, WrongBaseError  # noqa: E402
from lora_core.integrations.trainer import AdapterCheckpoint, BaseAlone  # noqa: E402
from tests.support.language_models import small_llama  # noqa: E402

CONFIG = LoraConfig(r=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("base"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    ids = torch.randint(10, 90, (24, 12))
    return [{"input_ids": row, "labels": row} for row in ids]


def four_bits(base):
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(base, quantization_config=packed)


def adapted(base, packed=False, config=CONFIG):
    model = four_bits(base) if packed else LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    inject(model, config)
    return model


def trainer_of(model, rows, output, checkpoint=True, **settings):
    given = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    given |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0, **settings}
    trainer = Trainer(model, TrainingArguments(str(output), **given), train_dataset=rows, eval_dataset=rows[:8])
    if checkpoint:
        trainer.add_callback(AdapterCheckpoint(trainer))
    return trainer


def values(model):
    return [p.detach().clone() for p in trainable_parameters(model)]


def sizes(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir()}


# --- a base in 4 bits -------------------------------------------------------------------------------------------------


def test_a_base_in_4_bits_is_trained_as_it_comes_from_transformers(base, rows, tmp_path):
    """The same steps by hand, an epoch of them, end with the same values."""
    model = adapted(base, packed=True, config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    by_hand = copy.deepcopy(model)
    trainer_of(model, rows, tmp_path, lr_scheduler_type="constant", max_grad_norm=0, weight_decay=0.0).train()
    optimizer = torch.optim.AdamW(trainable_parameters(by_hand), lr=1e-2, weight_decay=0.0, fused=True)
    batches = trainer_of(by_hand, rows, tmp_path / "hand", checkpoint=False).get_train_dataloader()
    by_hand.train()
    for batch in batches:  # the same order: the seed's
        by_hand(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(p.abs().max() > 1e-3 for p in values(model))
    for ours, expected in zip(values(model), values(by_hand), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_model_says_that_it_is_quantised_only_while_it_has_no_adapter(base):
    model = four_bits(base)
    inject(model, CONFIG)
    assert model.is_quantized is False
    unload(model)
    assert model.is_quantized is True and "save_pretrained" not in vars(model)
    inject(model, CONFIG)
    with pytest.raises(LoraError):
        inject(model, LoraConfig(target_modules=["nowhere"]), "other")
    assert model.is_quantized is False
    merge_and_unload(model)
    assert not getattr(model, "is_quantized", False)


def test_saving_the_model_says_what_to_call_instead(base, tmp_path):
    model = adapted(base)
    inner = model.model  # it is a transformers model too, and holds the layers with adapters
    for call in (model.save_pretrained, model.push_to_hub, copy.deepcopy(model).save_pretrained, inner.save_pretrained):
        with pytest.raises(StateError, match=r"save_adapter\(model, directory\), or merge_and_unload\(model\) first"):
            call(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    merge_adapter(model)
    model.save_pretrained(tmp_path / "folded")  # which loads as it computes now
    unmerge_adapter(model)
    with pytest.raises(StateError):
        model.save_pretrained(str(tmp_path / "saved"))
    merge_and_unload(model)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4 bits"])
def test_a_run_that_goes_on_ends_as_one_that_did_not_stop(base, rows, tmp_path, packed):
    whole = adapted(base, packed)
    trainer_of(whole, rows, tmp_path / "whole").train()
    trainer_of(adapted(base, packed), rows, tmp_path / "parts").train()
    model = adapted(base, packed)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.add_(1.0)  # what it goes on from is the file alone
    trainer_of(model, rows, tmp_path / "parts").train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for ours, expected in zip(values(model), values(whole), strict=True):
        assert torch.equal(ours, expected)


def test_a_checkpoint_is_the_adapter_the_optimiser_and_the_schedule(base, rows, tmp_path):
    trainer_of(adapted(base), rows, tmp_path).train()
    found = sizes(tmp_path / "checkpoint-6")
    needed = [found[name] for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")]
    assert sum(found.values()) <= 1.1 * sum(needed)
    assert "model.safetensors" not in found
    other = LlamaForCausalLM.from_pretrained(base)
    assert load_adapter(other, tmp_path / "checkpoint-6").targets  # PEFT's files, like any other


def test_the_best_model_is_restored(base, rows, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    model = adapted(base)
    trainer = trainer_of(model, rows, tmp_path, **settings, metric_for_best_model="loss", greater_is_better=True)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # the worst loss is the first
    best = LlamaForCausalLM.from_pretrained(base)
    load_adapter(best, tmp_path / "checkpoint-2", trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(best), strict=True))


def test_the_model_is_saved_and_pushed_as_an_adapter(base, rows, tmp_path, monkeypatch):
    sent = []

    class Hub:
        def upload_folder(self, folder_path, **settings):
            sent.append(sorted(path.name for path in transformers.trainer.Path(folder_path).iterdir() if path.is_file()))

    model = adapted(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    trainer = trainer_of(model, rows, tmp_path / "out")
    trainer.processing_class = tokenizer
    trainer.save_model(str(tmp_path / "saved"))
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(sizes(tmp_path / "saved"))
    assert "model.safetensors" not in sizes(tmp_path / "saved")
    trainer.hub_model_id, trainer.push_in_progress = "someone/adapter", None
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(transformers.trainer, "PushInProgress", lambda jobs: None)
    trainer.push_to_hub()
    trainer.args.push_to_hub = True
    trainer._push_from_checkpoint(str(tmp_path / "saved"))
    assert len(sent) == 2
    assert all({"adapter_config.json", "adapter_model.safetensors"} <= set(names) for names in sent)
    assert not any("model.safetensors" in names for names in sent)


def test_what_can_t_be_kept_is_refused_before_the_first_step(base, rows, tmp_path):
    with pytest.raises(AdapterNameError, match="holds no adapters"):
        trainer_of(LlamaForCausalLM.from_pretrained(base), rows, tmp_path)
    model = adapted(base)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]), "other")
    set_adapter(model, ["default", "other"])
    with pytest.raises(StateError, match="2 adapters are active: default, other; give adapter_name"):
        trainer_of(model, rows, tmp_path)
    model = adapted(base, config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(StateError, match=r"starts from the weights \('pissa'\)"):
        trainer_of(model, rows, tmp_path)
    model = adapted(base)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"1 tensors are trained that are not of adapter 'default'.*model\.norm\.weight"):
        trainer_of(model, rows, tmp_path).train()


def test_a_checkpoint_of_something_else_is_refused(base, rows, tmp_path):
    (tmp_path / "empty").mkdir()
    trainer = trainer_of(adapted(base), rows, tmp_path)
    with pytest.raises(StateError, match=r"has no adapter_config\.json"):
        trainer._load_from_checkpoint(str(tmp_path / "empty"))
    trainer.save_model(str(tmp_path / "saved"))
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaForCausalLM.from_pretrained(base).config)
    inject(model, CONFIG)
    with pytest.raises(WrongBaseError):
        trainer_of(model, rows, tmp_path)._load_from_checkpoint(str(tmp_path / "saved"))


# --- what the Trainer does to the forward -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"neftune_noise_alpha": 0.0},
    ],
    ids=["checkpointing", "reentrant", "compiled", "neftune without noise"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4 bits"])
def test_it_learns_the_same(base, rows, tmp_path, packed, settings):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    plain, other = adapted(base, packed, config), adapted(base, packed, config)
    trainer_of(plain, rows, tmp_path / "plain", max_steps=2).train()
    trainer_of(other, rows, tmp_path / "other", max_steps=2, **settings).train()
    for ours, expected in zip(values(other), values(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_neftune_s_noise_reaches_the_adapters_and_goes_with_the_training(base, rows, tmp_path):
    models = [adapted(base, config=LoraConfig(r=4, target_modules=["q_proj"])) for _ in range(2)]
    for model, alpha in zip(models, (5.0, None), strict=True):
        trainer_of(model, rows, tmp_path, max_steps=2, neftune_noise_alpha=alpha).train()
    assert not all(torch.equal(a, b) for a, b in zip(*map(values, models), strict=True))
    assert not models[0].get_input_embeddings()._forward_hooks


def test_the_base_alone_is_the_model_with_its_adapters_disabled(base):
    model = adapted(base)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.normal_()
    ids, alone = torch.arange(10, 22)[None], BaseAlone(model)
    expected = LlamaForCausalLM.from_pretrained(base)(input_ids=ids).logits
    found = alone(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not found.requires_grad and not list(alone.parameters()) and alone.config is model.config
    with disable_adapters(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(model.eval()(input_ids=ids).logits, expected, atol=1e-2)
    with pytest.raises(AdapterNameError):
        BaseAlone(LlamaForCausalLM.from_pretrained(base))


def test_what_is_saved_says_what_was_trained(base, rows, tmp_path):
    trainer = trainer_of(adapted(base), rows, tmp_path)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 16 and config["task_type"] == "CAUSAL_LM"
