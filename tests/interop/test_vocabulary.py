"""A vocabulary that grew, and rows trained for some tokens, with PEFT as the oracle: its files here, and ours there.

Every model is loaded from disk and grown anew, with other random rows for the new tokens, as in a new process: what a file does
not bring differs. Logits may differ by 1e-5: sums of at most 64 terms in float32, in other orders.
"""

import copy

import pytest
import torch
import transformers

from lora_core import (
    LoraConfig,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    unload,
    unmerge_adapter,
)
from tests.support import tiny

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*trains it apart:UserWarning", "ignore:.*tie_word_embeddings:UserWarning"),
]

SIZE, GROWN = tiny.SMALL["vocab_size"], 104
#: {name: (class, configuration, a projection, the embeddings, the head)}
MODELS = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**tiny.SMALL),
        "q_proj",
        "embed_tokens",
        "lm_head",
    ),
    "tied llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(tie_word_embeddings=True, **tiny.SMALL),
        "q_proj",
        "embed_tokens",
        "lm_head",
    ),
    "gpt2": (transformers.GPT2LMHeadModel, tiny.ARCHITECTURES["gpt2"][0], "c_attn", "wte", "lm_head"),
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig(**tiny.SMALL),
        "query",
        "word_embeddings",
        "decoder",
    ),
}
#: {case: (settings, whether the vocabulary grew)}; "E" is the embeddings, "H" the head
CASES = {
    "grown": ({}, True),
    "grown, embeddings adapted": ({"targets": ["E"]}, True),
    "grown, head adapted": ({"targets": ["H"]}, True),
    "grown, both whole": ({"modules_to_save": ["E", "H"]}, True),
    "grown, embeddings whole": ({"modules_to_save": ["E"]}, True),
    "grown, a new token": ({"tokens": [100]}, True),
    "grown, all new tokens": ({"tokens": [103, 100, 101, 99, 102]}, True),
    "tokens": ({"tokens": [40, 7, 8]}, False),
    "tokens of the embeddings": ({"tokens": {"E": [7, 8]}}, False),
    "the same tokens of both": ({"tokens": {"E": [7, 8], "H": [7, 8]}}, False),
    "other tokens of the head": ({"tokens": {"E": [7, 8], "H": [9]}}, False),
    "tokens of the head": ({"tokens": {"H": [9, 7]}}, False),
    "tokens, DoRA": ({"tokens": [7, 8], "use_dora": True}, False),
}
#: peft's file has the targeted layer alone, whose other end then has other new rows, in peft as well.
LOST = {("llama", "grown, embeddings adapted"), ("llama", "grown, head adapted")}
EVERY = [(model, case) for model in MODELS for case in CASES]
EVERY_CASE = pytest.mark.parametrize(("model", "case"), EVERY, ids=[f"{m}-{c}" for m, c in EVERY])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directories = {}
    for name, (kind, config, *_) in MODELS.items():
        torch.manual_seed(0)
        directories[name] = tmp_path_factory.mktemp("base") / "model"
        kind(config).save_pretrained(directories[name])
    return directories


class Case:
    """One model and one case: a base in a new process, the settings, and token ids."""

    def __init__(self, bases, model, case):
        self.kind, _, self.projection, embeddings, head = MODELS[model]
        self.directory = bases[model]
        names = {"E": embeddings, "H": head}
        settings, self.grows = CASES[case]
        self.settings = {k: v for k, v in settings.items() if k not in ("targets", "tokens")}
        self.settings["target_modules"] = [self.projection, *(names[t] for t in settings.get("targets", ()))]
        if "modules_to_save" in settings:
            self.settings["modules_to_save"] = [names[t] for t in settings["modules_to_save"]]
        if (tokens := settings.get("tokens")) is not None:
            named = isinstance(tokens, dict)
            self.settings["trainable_token_indices"] = {names[k]: v for k, v in tokens.items()} if named else tokens
        self.ids = torch.tensor([[7, 8, 9, 40, 3, 7], [*range(SIZE, GROWN), 7] if self.grows else [1, 2, 3, 4, 8, 9]])

    def base(self, seed):
        torch.manual_seed(seed)
        model = self.kind.from_pretrained(self.directory)
        if self.grows:
            model.resize_token_embeddings(GROWN, mean_resizing=False)
        return model.eval()

    @torch.no_grad()
    def logits(self, model):
        return model.eval()(self.ids).logits


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def differ(a, b):
    assert (a - b).abs().max() > 1e-2


@EVERY_CASE
def test_files_of_peft_load_here_and_every_verb_keeps_what_they_compute(bases, model, case, tmp_path):
    c = Case(bases, model, case)
    theirs = trained(peft.get_peft_model(c.base(1), peft.LoraConfig(r=2, **c.settings)))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = c.logits(theirs)
    ours = c.base(2)
    before, plain, tied = tiny.snapshot(ours), c.logits(ours), ours.config.tie_word_embeddings
    differ(plain, expected)
    if (model, case) in LOST:
        expected = c.logits(peft.PeftModel.from_pretrained(c.base(2), tmp_path / "theirs"))
        with pytest.warns(UserWarning, match=r"whose new rows stay this model's"):
            load_adapter(ours, tmp_path / "theirs")
    else:
        load_adapter(ours, tmp_path / "theirs")
    same(c.logits(ours), expected)
    merge_adapter(ours)
    same(c.logits(ours), expected)
    unmerge_adapter(ours)
    same(c.logits(ours), expected)
    with disable_adapters(ours):
        assert torch.equal(c.logits(ours), plain)
    merged = copy.deepcopy(ours)
    merge_and_unload(merged)
    same(c.logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    same(c.logits(c.kind.from_pretrained(tmp_path / "merged")), expected)
    unload(ours)
    assert tiny.snapshot(ours) == before and ours.config.tie_word_embeddings == tied


@EVERY_CASE
def test_files_made_here_load_in_peft_and_here(bases, model, case, tmp_path):
    c = Case(bases, model, case)
    ours = c.base(1)
    inject(ours, LoraConfig(r=2, **c.settings))
    trained(ours)
    save_adapter(ours, tmp_path / "ours")
    again = c.base(3)
    differ(c.logits(again), c.logits(ours))
    load_adapter(again, tmp_path / "ours")
    same(c.logits(again), c.logits(ours))
    same(c.logits(peft.PeftModel.from_pretrained(c.base(2), tmp_path / "ours")), c.logits(ours))


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_tokens_are_pefts(bases, model):
    c = Case(bases, model, "tokens")
    ours, theirs = c.base(1), c.base(1)
    torch.manual_seed(0)
    inject(ours, LoraConfig(r=2, init_lora_weights=False, **c.settings))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, **c.settings))
    values = [p for n, p in theirs.named_parameters() if "lora_" in n]
    mine = [p for n, p in ours.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    for own, other in zip(mine, values, strict=True):
        other.data.copy_(own.data)
    for m in (ours, theirs):
        m(c.ids).logits.logsumexp(-1).sum().backward()
    (rows,) = {id(p): p for n, p in ours.named_parameters() if "lora_tokens" in n}.values()
    (other,) = [p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n]
    assert rows.shape == (3, ours.get_input_embeddings().embedding_dim) and rows.grad.abs().sum() > 1
    torch.testing.assert_close(rows.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert ours.get_input_embeddings().weight.grad is None


def test_a_bias_of_a_tied_head_stays(bases):
    """Where PEFT 0.21 drops it: it multiplies by the head's rows alone."""
    c = Case(bases, "bert", "tokens")
    ours = c.base(1)
    ours.cls.predictions.decoder.bias.data.normal_()
    before = c.logits(ours)
    inject(ours, LoraConfig(r=2, **c.settings))
    same(c.logits(ours), before)
