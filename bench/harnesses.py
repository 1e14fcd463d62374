"""Two engines that put adapters on, and two harnesses that train them: what `reference_run.py` is made of.

For language models, which `peak_tuning.py` trains, the same again.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from experiments.attention import use_fast_attention
from experiments.batches import TokenisedTexts, batches
from experiments.completions import TokenisedCompletions
from experiments.job import Job, variants
from experiments.models import Loaded
from experiments.preparing import hold_in_bf16, prepare
from experiments.resumable import Course
from experiments.trainer import SentimentTrainer, training_arguments
from experiments.tuner import CompletionTrainer
from experiments.tuning import TuningJob
from lora_core import use_fast_dropout, use_fast_linear
from lora_core.cpu.heap import keep_few_shapes

# --- engines ----------------------------------------------------------------------------------------------------------


def ours(loaded: Loaded, job: Job) -> nn.Module:
    """As `experiments.train` prepares a model."""
    use_fast_linear(loaded.model)
    prepare(loaded, job, "SEQ_CLS", "the head")
    if job.bf16:
        hold_in_bf16(loaded)
    use_fast_dropout(loaded.model)
    use_fast_attention(loaded.model)
    return loaded.model


def theirs(loaded: Loaded, job: Job, task_type: str = "SEQ_CLS") -> nn.Module:
    """As peft's documentation says: 4-bit layers as transformers makes them, prepared for training, then adapters."""
    import peft

    from .peers import quantize_for_peft

    model, method = loaded.model, job.method
    if method.quantize:
        skip = {part for path in loaded.keep for part in path.split(".")[-1:]}
        packed = quantize_for_peft(model, tuple(skip), torch.bfloat16 if job.bf16 else None)
        for layer in packed.modules():  # what an evaluation packs for AVX512-BF16, bitsandbytes 0.50 can't train any more
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        model = peft.prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False)
    settings = {"r": method.r, "lora_alpha": method.lora_alpha, "lora_dropout": method.lora_dropout, **variants(method)}
    targets = job.targets[0] if job.targets == ("all-linear",) else list(job.targets)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type=task_type, **settings))


# --- harnesses --------------------------------------------------------------------------------------------------------


def own_trainer(model: nn.Module, job: Job, train: TokenisedTexts, validation: TokenisedTexts, output: Path) -> dict[str, Any]:
    """As `experiments.train` trains; returns predicted and train_seconds."""
    keep_few_shapes()
    arguments = training_arguments(job.schedule, len(train), output, "cpu", job.bf16, ())
    trainer = SentimentTrainer(model, arguments, train, validation, title=job.method.name, course=Course(output))
    return {"train_seconds": trainer.learn(), "predicted": trainer.predicted}


class PlainTrainer(Trainer):
    """transformers.Trainer, on the batches that the experiments cut."""

    def get_train_dataloader(self) -> Any:
        return batches(self.train_dataset, self.args.train_batch_size, seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return batches(self.eval_dataset, self.args.eval_batch_size)


def plain_trainer(
    model: nn.Module, job: Job, train: TokenisedTexts, validation: TokenisedTexts, output: Path
) -> dict[str, Any]:
    """transformers.Trainer with the same settings; returns predicted and train_seconds."""
    arguments = training_arguments(job.schedule, len(train), output, "cpu", job.bf16, ())
    scored: list[np.ndarray] = []
    order = np.concatenate(list(batches(validation, arguments.eval_batch_size).batch_sampler))  # like lengths stand together

    def keep(prediction: Any) -> dict[str, float]:
        scored.append(prediction.predictions.argmax(-1))
        return {"accuracy": float(np.mean(scored[-1] == prediction.label_ids))}

    trainer = PlainTrainer(model, arguments, train_dataset=train, eval_dataset=validation, compute_metrics=keep)
    spent = trainer.train().metrics["train_runtime"]
    evaluating = sum(entry["eval_runtime"] for entry in trainer.state.log_history if "eval_runtime" in entry)
    predicted = np.zeros(len(validation), np.uint8)
    predicted[order] = scored[-1]
    return {"train_seconds": spent - evaluating, "predicted": predicted}


HARNESSES = {"ours": own_trainer, "plain": plain_trainer}


# --- language models --------------------------------------------------------------------------------------------------


def our_tuned(loaded: Loaded, job: TuningJob) -> nn.Module:
    """As `experiments.sft` prepares a model."""
    keep_few_shapes()
    use_fast_linear(loaded.model)
    prepare(loaded, job, "CAUSAL_LM", besides="")
    if job.bf16:
        hold_in_bf16(loaded)
    return loaded.model


def their_tuned(loaded: Loaded, job: TuningJob) -> nn.Module:
    return theirs(loaded, job, "CAUSAL_LM")


def own_tuning(model: nn.Module, job: TuningJob, train: TokenisedCompletions, tokenizer: Any, output: Path) -> None:
    """As `experiments.sft` trains, without looking at what was learned."""
    arguments = training_arguments(job.schedule, len(train), output, "cpu", job.bf16, ())
    arguments.eval_strategy = "no"
    settings = {"title": job.method.name, "course": Course(output), "tokenizer": tokenizer, "held_out": ()}
    CompletionTrainer(model, arguments, train, train, **settings).learn()


def plain_tuning(model: nn.Module, job: TuningJob, train: TokenisedCompletions, tokenizer: Any, output: Path) -> None:
    """A loop on the same batches, with the loss that transformers' model computes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.schedule.learning_rate, fused=True)
    model.train()
    for batch in itertools.islice(batches(train, job.schedule.batch_size, seed=job.schedule.seed), job.schedule.max_steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, job.schedule.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
