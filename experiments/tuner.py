"""The Trainer for language models: loss on completions alone; judged by that loss, and by greedy answers right to the letter.

trl's SFTTrainer does this too. It would bring a dataset library and checkpoints of its own, where these go on bit for bit.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import LikeLengthBatches, batches
from .completions import IGNORED, TokenisedCompletions, packed
from .conversations import Conversation
from .errors import ExperimentError
from .generation import greedy, share_equal
from .next_token import FrozenHead, summed_cross_entropy
from .trainer import BatchTrainer

#: Rows of a batch whose loss is only looked at: with 49,152 words, 8 rows' logits are what a training step holds too.
LOSS_BATCH = 8
#: Tokens that an answer may have beyond the longest right one.
SPARE_TOKENS = 8


class CompletionTrainer(BatchTrainer):
    """A Trainer for conversations. `run` trains (or only evaluates) and returns the numbers.

    Args:
        tokenizer: of the model.
        held_out: the conversations of the validation set.
        packing: lay the rows of a batch end to end instead of padding them.

    Raises:
        ExperimentError: the model takes no `position_ids`, which packing needs.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        tokenizer: Any,
        held_out: Sequence[Conversation],
        packing: bool = False,
        **settings: Any,
    ) -> None:
        taken = inspect.signature(model.forward).parameters
        if packing and "position_ids" not in taken:
            raise ExperimentError(f"--packing: {type(model).__name__} takes no position_ids, by which rows are told apart")
        self.cuts_logits = "logits_to_keep" in taken
        super().__init__(model, *args, **settings)
        self.tokenizer, self.held_out, self.packing = tokenizer, held_out, packing
        self.head = FrozenHead.of(model)

    # --- learning -----------------------------------------------------------------------------------------------------

    def share(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """This process's part of a batch, and the weight of its loss, a mean over the tokens that are learned."""
        everything = learned(inputs["labels"])
        inputs, weight = super().share(inputs)
        count = self.course.processes.count
        weight = learned(inputs["labels"]) * count / everything if count > 1 and weight else weight
        return packed(inputs) if self.packing else inputs, weight

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss, count = self.completion_loss(model, inputs)
        loss = loss / count
        self.loss = loss.detach()
        return loss * self.weight if model.training and self.course.processes.count > 1 else loss

    def completion_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The cross entropy of a batch's completions, summed over their tokens, and how many those are."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")  # B T
        places = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]  # K: where the next token is learned in some row
        inputs |= {"use_cache": False} | ({"logits_to_keep": places} if self.cuts_logits else {})
        targets = labels[:, places + 1]  # B K
        matter = targets != IGNORED
        if self.head is not None and (hidden := self.head.inputs(model, **inputs)) is not None:
            hidden = hidden if self.cuts_logits else hidden[:, places]  # B K d
            loss = summed_cross_entropy(hidden[matter], self.head.weight, self.head.bias, targets[matter])
        else:
            self.head = None
            logits = model(**inputs).logits  # B K V, or B T V
            logits = logits if self.cuts_logits else logits[:, places]
            loss = F.cross_entropy(logits[matter].float(), targets[matter], reduction="sum")
        return loss, int(matter.sum())

    # --- being judged -------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and share of exact answers on the held-out rows; every process evaluates everything."""
        start, model, training = time.perf_counter(), self.model, self.model.training
        model.eval()
        total, count = 0.0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches(self.eval_dataset, LOSS_BATCH):
                loss, tokens = self.completion_loss(model, {k: t.to(self.args.device) for k, t in batch.items()})
                total, count = total + loss.item(), count + tokens
        answers = self.answers()
        model.train(training)
        metrics = {
            "eval_loss": total / count,
            "eval_exact_match": share_equal(answers, [c.completion for c in self.held_out]),
            "eval_runtime": time.perf_counter() - start,
        }
        self.check_loss(metrics["eval_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def answers(self) -> list[str]:
        """What the model answers to each of the held-out conversations."""
        data: TokenisedCompletions = self.eval_dataset
        prompts = [data.ids[o : o + n].tolist() for o, n in zip(data.offsets, data.prompts, strict=False)]
        with self.compute_loss_context_manager():
            return greedy(self.model, self.tokenizer, prompts, data.longest_completion + SPARE_TOKENS)

    def in_words(self, metrics: dict[str, Any]) -> str:
        return f"{metrics['eval_exact_match']:.1%} of the held-out answers are exact, loss {metrics['eval_loss']:.3f}"

    def status(self, logs: dict[str, Any]) -> dict[str, str]:
        return super().status(logs) | {"tokens/s": f"{self.tokens_seen() / max(self.seconds, 1e-9):.0f}"}

    # --- the run ------------------------------------------------------------------------------------------------------

    def tokens_seen(self) -> int:
        """Tokens of the batches so far, whichever process began with them; padding is not counted."""
        lengths, total = self.train_dataset.lengths, 0
        sampler = LikeLengthBatches(lengths, self.args.train_batch_size, self.args.seed)
        left = self.state.global_step
        while left:
            epoch = list(sampler)[:left]
            total, left = total + sum(int(lengths[indices].sum()) for indices in epoch), left - len(epoch)
        return total

    def run(self, learn: bool = True) -> dict[str, Any]:
        """Train and evaluate, before it and after each epoch; with `learn` False, only evaluate.

        Returns:
            exact_match and loss on the held-out rows at the end; the same before training, as exact_match_before and
            loss_before; exact_match_by_epoch; train_seconds without the evaluations; tokens_per_second; loss_history.

        Raises:
            Stopped, ExperimentError: as `fit`.
        """
        seconds = self.learn() if learn else 0.0
        if not learn:
            self.accelerator.prepare_model(self.model, evaluation_mode=True)  # in autocast, as training would have it
            self.evaluate()
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        first, last = evaluations[0], evaluations[-1]
        return {
            "exact_match": last["eval_exact_match"],
            "loss": round(last["eval_loss"], 6),
            "exact_match_before": first["eval_exact_match"],
            "loss_before": round(first["eval_loss"], 6),
            "exact_match_by_epoch": [entry["eval_exact_match"] for entry in evaluations[1:]],
            "train_seconds": round(seconds, 2),
            "tokens_per_second": round(self.tokens_seen() / seconds, 1) if learn else None,
            "loss_history": self.loss_history,
            **self.peaks,
        }


def learned(labels: Tensor) -> int:
    """How many tokens of a batch are learned; the first of a row is predicted from nothing."""
    return int((labels[:, 1:] != IGNORED).sum())
