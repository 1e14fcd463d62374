"""Tied weights (a head that is the input embeddings): trained apart as in PEFT, merged, saved and loaded."""

import warnings

import peft
import pytest
import torch
import transformers

from lora_core import (
    LoraConfig,
    delete_adapter,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_core.errors import FileFormatError, StateError, TargetError
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*trains it apart:UserWarning", "ignore:.*tie_word_embeddings:UserWarning")

SMALL = {**tiny.SMALL, "num_key_value_heads": 2}
BART = {"d_model": 32, "vocab_size": 99}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
#: {name: (model, a projection, its embeddings, its head)}; T5's and BART's tensor has four names.
MODELS = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **SMALL)),
        "q_proj",
        "embed_tokens",
        "lm_head",
    ),
    "qwen2": (
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(tie_word_embeddings=True, **SMALL)),
        "q_proj",
        "embed_tokens",
        "lm_head",
    ),
    "gpt2": (lambda: tiny.build("gpt2"), "c_attn", "wte", "lm_head"),
    "t5": (lambda: tiny.build("t5"), "q", "shared", "lm_head"),
    "bart": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
        "q_proj",
        "shared",
        "lm_head",
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**tiny.SMALL)),
        "query",
        "word_embeddings",
        "cls.predictions.decoder",
    ),
}
CASES = {
    "embeddings whole": ((), ("embeddings",), False),
    "head whole": ((), ("head",), False),
    "both whole": ((), ("embeddings", "head"), False),
    "as one": ((), ("embeddings",), True),
    "adapter on the head": (("head",), (), False),
    "adapter on the embeddings": (("embeddings",), (), False),
    "adapters on both": (("embeddings", "head"), (), False),
}
EVERY = [
    (model, case)
    for model in MODELS
    for case, (targets, *_) in CASES.items()
    if not (model == "bart" and "embeddings" in targets)  # scaled embeddings, with a forward of their own
]


def build(model):
    torch.manual_seed(0)
    return MODELS[model][0]().eval()


def settings(model, case):
    _, projection, embeddings, head = MODELS[model]
    names = {"embeddings": embeddings, "head": head}
    targets, whole, as_one = CASES[case]
    return {
        "r": 2,
        "target_modules": [projection, *(names[t] for t in targets)],
        "modules_to_save": [names[w] for w in whole] or None,
        "ensure_weight_tying": as_one,
    }


def adapted(model, case):
    found = build(model)
    inject(found, LoraConfig(**settings(model, case)))
    return tiny.randomize(found)


@pytest.mark.parametrize(("model", "case"), EVERY)
def test_merging_computes_what_the_adapter_did_and_so_does_the_saved_model(model, case, tmp_path):
    found = adapted(model, case)
    expected, base = tiny.logits(found), tiny.logits(build(model))
    assert (expected - base).abs().max() > 1e-3 or model == "bart"
    report = merge_and_unload(found)
    bound = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}  # float32 sums in another order
    torch.testing.assert_close(tiny.logits(found), expected, **bound)
    assert bool(report.untied) == (case != "as one") and found.config.tie_word_embeddings == (case == "as one")
    assert case == "as one" or "no longer tied" in str(report)
    found.save_pretrained(tmp_path)
    again = type(found).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny.logits(again), expected, **bound)


@pytest.mark.filterwarnings("ignore:.*Attempting to save a model:UserWarning")
@pytest.mark.parametrize("leave", [unmerge_adapter, unload])
@pytest.mark.parametrize(("model", "case"), EVERY)
def test_a_model_saved_while_merged_in_place_computes_the_same_and_is_tied_again_after_that(model, case, leave, tmp_path):
    found = adapted(model, case)
    adapter, before, said = tiny.logits(found), places(found), found.config.tie_word_embeddings
    merge_adapter(found)
    expected = tiny.logits(found)
    torch.testing.assert_close(expected, adapter, rtol=0, atol=1e-5 * adapter.abs().max().item())  # sums in another order
    assert found.config.tie_word_embeddings == (case == "as one")
    found.save_pretrained(tmp_path)
    again = type(found).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(again), expected)
    leave(found)
    if leave is unmerge_adapter:
        assert torch.equal(tiny.logits(found), adapter) and places(found) == before
        assert found.config.tie_word_embeddings == said
        unload(found)
    assert places(found) == places(build(model)) and found.config.tie_word_embeddings
    assert found.all_tied_weights_keys == build(model).all_tied_weights_keys


def places(model):
    """{path: the first path of the tensor that is there}."""
    first = {}
    return {path: first.setdefault(p.data_ptr(), path) for path, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(("model", "case"), EVERY)
def test_files_go_to_peft_and_back(model, case, tmp_path):
    found = adapted(model, case)
    save_adapter(found, tmp_path / "ours")
    again = build(model)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(tiny.logits(again), tiny.logits(found))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(model), tmp_path / "ours").eval()
    expected = tiny.logits(found)
    torch.testing.assert_close(tiny.logits(theirs), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("model", "case"), [e for e in EVERY if e[0] in ("llama", "qwen2", "gpt2")])
def test_files_of_peft_load_here(model, case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(model), peft.LoraConfig(**settings(model, case))).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        theirs.save_pretrained(tmp_path)
    ours = build(model)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs.base_model.model), rtol=0, atol=1e-5)
    unload(ours)
    assert torch.equal(tiny.logits(ours), tiny.logits(build(model)))
    paths = [path for path, p in ours.named_parameters(remove_duplicate=False) if p is ours.get_output_embeddings().weight]
    assert len(paths) == 2  # tied again


def test_loading_says_that_the_tie_is_gone(tmp_path):
    save_adapter(adapted("llama", "both whole"), tmp_path)
    with pytest.warns(UserWarning, match="trains it apart"):
        report = load_adapter(build("llama"), tmp_path)
    assert set(report.untied) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_one_of_two_names_is_enough_and_two_values_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    found = adapted("llama", "as one")
    save_adapter(found, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, file)
    again = build("llama")
    load_adapter(again, tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(found)) and again.lm_head.weight is again.model.embed_tokens.weight
    save_file(tensors | {"base_model.model.lm_head.weight": head + 1}, file)
    with pytest.raises(FileFormatError, match=r"differ, and ensure_weight_tying is set"):
        load_adapter(build("llama"), tmp_path)


def test_two_adapters_that_are_to_be_one_are_refused():
    with pytest.raises(TargetError, match=r"ensure_weight_tying: .* are tied, and an adapter goes on one of them"):
        inject(build("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True))


def test_memory_that_is_shared_without_being_one_parameter_is_not_written_to():
    """`lm_head.weight.data = embed_tokens.weight.data`: two parameters, one memory."""
    model = tiny.classifier()
    model.layers[1].q.weight.data = model.layers[0].q.weight.data
    inject(model, LoraConfig(r=2, target_modules=["layers.0.q"]))
    tiny.randomize(model)
    expected = model(tiny.batch())
    assert merge_and_unload(model).untied == ("layers.0.q.weight",)
    torch.testing.assert_close(model(tiny.batch()), expected)


@pytest.mark.parametrize("now", ["a", "b"])
@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_file_that_holds_tied_tensors_once_brings_all_heads_back(whole, now, tmp_path):
    """What transformers' Trainer writes as a checkpoint, and reads with `strict=False`."""
    from safetensors.torch import load_file

    def adapted(active):
        model = build("llama")
        for i, name in enumerate("ab"):
            inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole), name)
            tiny.randomize(model, name, seed=i)
        set_adapter(model, active)
        return model

    model = adapted("a")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    expected = {name: (set_adapter(model, name), tiny.logits(model))[1] for name in "ba"}
    type(model).save_pretrained(model, tmp_path)  # the model's own refuses: nobody but this test reads such a file
    other = adapted(now)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    for name in "ab":
        set_adapter(other, name)
        assert torch.equal(tiny.logits(other), expected[name])
    assert torch.equal(tiny.logits(unload(other)), tiny.logits(unload(model)))


def test_a_tie_that_is_to_be_kept_and_is_not_there_is_said():
    model = tiny.classifier()
    settings = {"r": 2, "target_modules": ["q"], "modules_to_save": ["classifier"], "ensure_weight_tying": True}
    with pytest.warns(UserWarning, match="nothing that is trained whole is tied to anything") as caught:
        inject(model, LoraConfig(**settings))
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(("model", "case"), EVERY)
def test_transformers_tying_again_leaves_what_is_trained_apart(model, case):
    """accelerate and transformers call `tie_weights` on models that they place, load or resize."""
    found = adapted(model, case)
    expected = tiny.logits(found)
    apart = "whole" in case
    assert found.config.tie_word_embeddings != apart
    found.tie_weights()
    assert torch.equal(tiny.logits(found), expected)
    unload(found)
    assert places(found) == places(build(model)) and found.config.tie_word_embeddings
    assert found.all_tied_weights_keys == build(model).all_tied_weights_keys


def test_another_model_of_the_same_configuration_stays_tied(tmp_path):
    config = transformers.LlamaConfig(tie_word_embeddings=True, **SMALL)
    ours, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    inject(ours, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert other.config.tie_word_embeddings and not ours.config.tie_word_embeddings
    other.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(type(other).from_pretrained(tmp_path).eval()), tiny.logits(other))
    merge_and_unload(ours)
    assert other.config.tie_word_embeddings and not ours.config.tie_word_embeddings


def test_the_model_says_that_it_is_tied_when_no_adapter_is_left_that_trains_apart():
    model = build("llama")
    for name, whole in (("a", ["lm_head"]), ("b", None), ("c", ["embed_tokens"])):
        inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole), name)
    for name, tied in (("a", False), ("c", True), ("b", True)):
        delete_adapter(model, name)
        assert model.config.tie_word_embeddings == tied == ("lm_head.weight" in model.all_tied_weights_keys)


@pytest.mark.parametrize("verb", [lambda m, d: save_adapter(m, d), lambda m, d: merge_and_unload(m)], ids=["save", "merge"])
def test_a_head_tied_again_from_outside_is_refused(verb, tmp_path):
    """The embeddings are where the trained head was: what would be saved or merged is the base's."""
    model = MODELS["llama"][0]()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(StateError, match="replaced by the base's own tensor"):
        verb(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "verb", [lambda m, d: save_adapter(m, d), lambda m, d: merge_and_unload(m), lambda m, d: merge_adapter(m)]
)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_layer_that_was_resized_under_its_adapter_is_refused(target, verb, tmp_path):
    model = build("llama")
    inject(model, LoraConfig(r=2, target_modules=[target]))
    model.resize_token_embeddings(110)
    with pytest.raises(TargetError, match=rf"{target} maps .*110.*made for .*99.*resize_token_embeddings does, before"):
        verb(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert type(unload(model).get_input_embeddings()) is torch.nn.Embedding
