"""A vocabulary that grew, and rows trained for some tokens, merged over files: as merged in memory, and as PEFT computes."""

import json

import pytest
import torch
import transformers

from lora_core import (
    LoraConfig,
    convert_adapter,
    inject,
    inspect_adapter,
    load_adapter,
    merge_and_unload,
    merge_checkpoint,
    save_adapter,
)
from lora_core.errors import StateError, WrongBaseError
from tests.support import tiny

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*trains it apart:UserWarning", "ignore:.*tie_word_embeddings:UserWarning"),
]

SIZE, GROWN = tiny.SMALL["vocab_size"], 104
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**tiny.SMALL), "q_proj", "embed_tokens", "lm_head"),
    "tied llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(tie_word_embeddings=True, **tiny.SMALL),
        "q_proj",
        "embed_tokens",
        "lm_head",
    ),
    "gpt2": (transformers.GPT2LMHeadModel, tiny.ARCHITECTURES["gpt2"][0], "c_attn", "wte", "lm_head"),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**tiny.SMALL), "query", "word_embeddings", "decoder"),
}
NEW = list(range(SIZE, GROWN))
#: {case: (settings, whether the vocabulary grew)}; "E" is the embeddings, "H" the head
CASES = {
    "grown": ({}, True),
    "embeddings adapted": ({"targets": ["E"]}, True),
    "both adapted": ({"targets": ["E", "H"]}, True),
    "both whole": ({"modules_to_save": ["E", "H"]}, True),
    "a new token": ({"tokens": [100]}, True),
    "all new tokens": ({"tokens": [7, *NEW]}, True),
    "tokens": ({"tokens": [40, 7, 8]}, False),
    "other tokens of the head": ({"tokens": {"E": [7, 8], "H": [9]}}, False),
    "tokens of the head": ({"tokens": {"H": [9, 7]}}, False),
}
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


def load(bases, model, size=None):
    kind = MODELS[model][0]
    made = kind.from_pretrained(bases[model])
    if size:
        made.resize_token_embeddings(size, mean_resizing=False)
    return made.eval()


def settings_of(model, case):
    settings, grows = CASES[case]
    _, _, projection, embeddings, head = MODELS[model]
    names = {"E": embeddings, "H": head}
    found = {"r": 2, "target_modules": [projection, *(names[t] for t in settings.get("targets", ()))]}
    if "modules_to_save" in settings:
        found["modules_to_save"] = [names[t] for t in settings["modules_to_save"]]
    if (tokens := settings.get("tokens")) is not None:
        found["trainable_token_indices"] = {names[k]: v for k, v in tokens.items()} if isinstance(tokens, dict) else tokens
    return found, GROWN if grows else None


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model, grown):
    ids = torch.tensor([[7, 8, 9, 40, 3, 7], [*(NEW if grown else range(5)), 7]])
    return model.eval()(ids).logits


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def loads_exactly(kind, directory):
    model, loading = kind.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model


@EVERY_CASE
@pytest.mark.parametrize("maker", ["here", "peft"])
def test_a_merge_over_files_computes_what_the_adapted_model_does(bases, model, case, maker, tmp_path):
    settings, size = settings_of(model, case)
    if maker == "peft" and (model, case) == ("llama", "embeddings adapted"):
        pytest.skip("peft's file has no rows of the head then")
    adapted = load(bases, model, size)
    if maker == "here":
        inject(adapted, LoraConfig(**settings))
        save_adapter(trained(adapted), tmp_path / "adapter")
    else:
        adapted = peft.get_peft_model(adapted, peft.LoraConfig(**settings))
        trained(adapted).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"from": "adapter"}')
    expected = logits(adapted, size)
    if (model, case) == ("bert", "both whole"):  # the base has that bias under a second name, and no rows for new tokens there
        with pytest.raises(WrongBaseError, match=r"for 104 tokens, and cls\.predictions\.bias has 99 rows"):
            merge_checkpoint(bases[model], [tmp_path / "adapter"], tmp_path / "merged")
        return
    merge_checkpoint(bases[model], [tmp_path / "adapter"], tmp_path / "merged")
    merged = loads_exactly(MODELS[model][0], tmp_path / "merged")
    same(logits(merged, size), expected)
    assert merged.config.vocab_size == (size or SIZE) == len(merged.get_input_embeddings().weight)
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text()) == {"from": "adapter"}
    # The tie is there as after merging in memory.
    ours = load(bases, model, size)
    load_adapter(ours, tmp_path / "adapter")
    merge_and_unload(ours)
    assert merged.config.tie_word_embeddings == ours.config.tie_word_embeddings


def adapter(bases, tmp_path, model="tied llama", size=None, name="adapter", save=(), **settings):
    made = load(bases, model, size)
    inject(made, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    save_adapter(trained(made), tmp_path / name, **dict(save))
    return made


def test_what_an_adapter_has_not_all_rows_of_is_refused(bases, tmp_path):
    adapter(bases, tmp_path, size=GROWN, trainable_token_indices=[103], save={"save_embedding_layers": False})
    with pytest.raises(WrongBaseError, match=r"trains token 103 of model\.embed_tokens, and the base has 99 rows"):
        merge_checkpoint(bases["tied llama"], [tmp_path / "adapter"], tmp_path / "merged")
    adapter(bases, tmp_path, "llama", GROWN, "half", trainable_token_indices=NEW, save={"save_embedding_layers": False})
    with pytest.raises(WrongBaseError, match=r"embed_tokens\.weight for 104 tokens, and lm_head\.weight has 99 rows"):
        merge_checkpoint(bases["llama"], [tmp_path / "half"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_embeddings_of_another_base_are_refused(bases, tmp_path):
    made = load(bases, "llama", GROWN)
    made.model.embed_tokens.weight.data[2] += 1
    inject(made, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(made, tmp_path / "adapter")
    with pytest.raises(WrongBaseError, match="the weight of model.embed_tokens that it was trained on"):
        merge_checkpoint(bases["llama"], [tmp_path / "adapter"], tmp_path / "merged")


def test_two_adapters_with_rows(bases, tmp_path):
    adapter(bases, tmp_path, name="a", trainable_token_indices=[3, 4])
    adapter(bases, tmp_path, name="b", trainable_token_indices=[5])
    both = load(bases, "tied llama")
    load_adapter(both, tmp_path / "a", "a")
    load_adapter(both, tmp_path / "b", "b")
    merge_and_unload(both, ["a", "b"])
    merge_checkpoint(bases["tied llama"], [tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    same(logits(loads_exactly(MODELS["tied llama"][0], tmp_path / "merged"), None), logits(both, None))
    adapter(bases, tmp_path, name="c", trainable_token_indices=[4, 9])
    with pytest.raises(StateError, match="two adapters train the same token"):
        merge_checkpoint(bases["tied llama"], [tmp_path / "a", tmp_path / "c"], tmp_path / "other")


def test_inspecting_and_converting_keep_them(bases, tmp_path):
    made = adapter(bases, tmp_path, size=GROWN, trainable_token_indices=[7, 100])
    found = inspect_adapter(tmp_path / "adapter")
    assert found.tokens == {"model.embed_tokens": 2} and "2 rows of model.embed_tokens" in str(found)
    convert_adapter(tmp_path / "adapter", tmp_path / "half", dtype=torch.bfloat16)
    again = load(bases, "tied llama", GROWN)
    load_adapter(again, tmp_path / "half")
    assert (logits(again, GROWN) - logits(made, GROWN)).abs().max() < 0.1
