"""Conversations as tokens: what is learned of them, padded and packed; and greedy answers."""

import pytest
import torch
import transformers

from experiments.batches import batches
from experiments.completions import IGNORED, Template, TokenisedCompletions, packed
from experiments.conversations import Conversation
from experiments.errors import ExperimentError
from experiments.generation import greedy, share_equal
from tests.support import tiny
from tests.support.language_models import small_llama, small_tokenizer

ROWS = [Conversation((("user", "x" * n),), "y" * (1 + n % 3), f"file:{n}") for n in (1, 5, 2, 9, 4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = small_llama(tmp_path_factory.mktemp("llama"))
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def test_the_template_s_answer_ends_where_the_model_is_to_stop():
    template = Template(small_tokenizer())
    row = Conversation((("system", "s"), ("user", "u")), "a", "file:1")
    assert template.prompt(row) == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"
    assert template.completion(row) == "a<|end|>"
    tokenizer = small_tokenizer("{% for m in messages %}{{ m['content'] }}{{ '\n' }}{% endfor %}")  # which ends nothing itself
    assert Template(tokenizer).completion(row) == "a\n<|end|>"
    tokenizer = small_tokenizer("{% for m in messages %}{{ m['content'] }}<|end|>{{ '\n' }}{% endfor %}")
    assert Template(tokenizer).completion(row) == "a<|end|>"  # what follows the end is not learned


def test_without_a_template_texts_are_as_they_are():
    template = Template(small_tokenizer(None))
    assert (template.prompt(ROWS[1]), template.completion(ROWS[1])) == ("xxxxx", "yyy<|end|>")
    with pytest.raises(ExperimentError, match=r"file:1: several messages, and this model's tokenizer has no chat template"):
        template.prompt(Conversation((("system", "s"), ("user", "u")), "a", "file:1"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('no such role') }}", "refuses it: no such role"),
        ("{{ messages | length }}<|end|>", "writes another prompt than without"),
    ],
)
def test_a_template_that_can_t_be_used_is_named(source, says):
    with pytest.raises(ExperimentError, match=says):
        Template(small_tokenizer(source)).completion(ROWS[0])


def test_a_tokenizer_that_ends_nothing_is_refused():
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ExperimentError, match="no eos_token"):
        Template(tokenizer)


def test_completions_alone_are_learned():
    tokenizer = small_tokenizer()
    data = TokenisedCompletions(Template(tokenizer), ROWS, 64)
    batch = data[[0, 3, 1]]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, index in zip(range(3), (0, 3, 1), strict=True):
        kept = batch["labels"][row] != IGNORED
        assert tokenizer.decode(batch["input_ids"][row][kept]) == ROWS[index].completion + "<|end|>"
        assert torch.equal(batch["labels"][row][kept], batch["input_ids"][row][kept])
        assert batch["attention_mask"][row].sum() == data.lengths[index] and (batch["attention_mask"][row][kept] == 1).all()
    assert data.longest_completion == 4


def test_a_row_that_is_too_long_is_refused_and_named():
    with pytest.raises(ExperimentError, match=r"file:9: it has 14 tokens, and 13 are read; shorten it or raise --max-length"):
        TokenisedCompletions(Template(small_tokenizer()), ROWS, 13)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_don_t_see_each_other(name, llama):
    """The logits of each row are those that it has alone."""
    model = llama if name == "llama" else tiny.build("gpt2").eval()
    data = TokenisedCompletions(Template(small_tokenizer()), ROWS, 64)
    data.ids %= model.config.vocab_size
    batch = data[[0, 1, 2, 3, 4]]
    rows = packed(batch)
    assert rows["input_ids"].shape == (1, int(data.lengths.sum())) and "attention_mask" not in rows
    labels = rows.pop("labels")
    with torch.no_grad():
        found = model(**rows, use_cache=False).logits[0].split(data.lengths.tolist())
        for row, logits in enumerate(found):
            alone = batch["input_ids"][row, : data.lengths[row]][None]
            torch.testing.assert_close(logits, model(input_ids=alone).logits[0], rtol=0, atol=1e-5)
    expected = [batch["labels"][row, : data.lengths[row]] for row in range(5)]
    assert torch.equal(labels[0], torch.cat(expected))  # a prompt is before each, so no row's first token is learned


def test_batches_are_of_like_length():
    data = TokenisedCompletions(Template(small_tokenizer()), ROWS * 8, 64)
    spread = [int(b["attention_mask"].sum(1).max() - b["attention_mask"].sum(1).min()) for b in batches(data, 8, seed=0)]
    assert sum(spread) <= 8


def test_greedy_answers_are_those_of_the_slow_way_and_in_order(llama):
    """One prompt at a time, every token from the whole text so far, without a cache."""
    tokenizer = small_tokenizer()
    prompts = [Template(tokenizer).prompt_ids(row) for row in ROWS]
    llama.train()
    found = greedy(llama, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    assert llama.training
    llama.eval()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(llama(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        assert tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) == answer
    assert share_equal(["a ", "b"], ["a", "c"]) == 0.5
