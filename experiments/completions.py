"""Conversations as a causal language model reads them: tokens of a prompt, then those of its completion.

The prompt is what the model's own chat template makes of the messages, up to where the assistant begins to speak; the
completion is what the template adds for the answer, up to the token that ends it. Without a template both are as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import TokenisedTexts
from .conversations import Conversation
from .errors import ExperimentError

#: The label of a token that is not learned: what transformers and torch pass over.
IGNORED = -100


class Template:
    """How a tokenizer writes conversations.

    Raises:
        ExperimentError: the tokenizer has no token that ends an answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.has_own = tokenizer, bool(tokenizer.chat_template)
        if tokenizer.eos_token is None:
            raise ExperimentError("model: its tokenizer has no eos_token, which would end an answer; set one")

    def prompt(self, conversation: Conversation) -> str:
        """The text that the model is to go on from."""
        if self.has_own:
            return self._apply(conversation, conversation.messages, add_generation_prompt=True)
        if len(conversation.prompt) > 1:
            raise ExperimentError(
                f"data: {conversation.where}: several messages, and this model's tokenizer has no chat template; give rows "
                "with 'prompt' and 'completion', or a model that has one"
            )
        return conversation.prompt[0][1]

    def completion(self, conversation: Conversation) -> str:
        """What is to follow, with the token that ends it."""
        end = self.tokenizer.eos_token
        if not self.has_own:
            return conversation.completion + end
        answer = {"role": "assistant", "content": conversation.completion}
        whole = self._apply(conversation, [*conversation.messages, answer])
        prompt = self.prompt(conversation)
        if not whole.startswith(prompt):
            raise ExperimentError(
                f"data: {conversation.where}: with the answer, this model's chat template writes another prompt than without; "
                "its completion can't be told apart"
            )
        text = whole[len(prompt) :]
        return text[: text.rindex(end)] + end if end in text else text + end  # after it the model is not asked

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The tokens of `prompt`; a template writes the special ones itself."""
        return self.tokenizer(self.prompt(conversation), add_special_tokens=not self.has_own)["input_ids"]

    def completion_ids(self, conversation: Conversation) -> list[int]:
        """The tokens of `completion`."""
        return self.tokenizer(self.completion(conversation), add_special_tokens=False)["input_ids"]

    def _apply(self, conversation: Conversation, messages: list[dict[str, str]], **settings: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except Exception as error:  # whatever a template raises
            raise ExperimentError(f"data: {conversation.where}: this model's chat template refuses it: {error}") from None


class TokenisedCompletions(TokenisedTexts):
    """N conversations. Indexed by a list of B indices, it gives one padded batch of tensors.

        input_ids       (B, T) int64, padded on the right with `pad_id`
        attention_mask  (B, T) int64, 1 for a token and 0 for padding
        labels          (B, T) int64, the tokens of the completions; IGNORED elsewhere

    Raises:
        ExperimentError: a conversation is longer than `max_length` tokens, or too long for `Template`.
    """

    def __init__(self, template: Template, conversations: Sequence[Conversation], max_length: int) -> None:
        pairs = [(template.prompt_ids(c), template.completion_ids(c)) for c in conversations]
        for conversation, (prompt, completion) in zip(conversations, pairs, strict=True):
            if (length := len(prompt) + len(completion)) > max_length:
                raise ExperimentError(
                    f"data: {conversation.where}: it has {length:,} tokens, and {max_length:,} are read; shorten it or raise "
                    "--max-length"
                )
        self.ids = np.concatenate([np.array([*prompt, *completion], dtype=np.int32) for prompt, completion in pairs])
        self.lengths = np.array([len(prompt) + len(completion) for prompt, completion in pairs], dtype=np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.prompts = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int32)
        self.labels, self.pad_id = None, template.tokenizer.pad_token_id

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        batch = super().__getitem__(indices)
        prompts = torch.from_numpy(self.prompts[indices])[:, None]  # (B, 1)
        learned = (torch.arange(batch["input_ids"].shape[1]) >= prompts) & batch["attention_mask"].bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~learned, IGNORED)}

    __getitems__ = __getitem__

    @property
    def longest_completion(self) -> int:
        """The most tokens of a completion."""
        return int((self.lengths - self.prompts).max())


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a padded batch end to end, as one row without padding; N tokens in all.

    Returns:

        input_ids     (1, N)
        position_ids  (1, N), which begin anew with each row: transformers' masks keep the rows apart by that
        labels        (1, N)
    """
    kept = batch["attention_mask"].bool()  # (B, T), on the right of each row nothing
    positions = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED  # nothing of a row is predicted from the row before
    rows = {"input_ids": batch["input_ids"], "position_ids": positions, "labels": labels}
    return {name: tensor[kept][None] for name, tensor in rows.items()}
