"""`layer_replication`: a deeper model of the same weights, against PEFT's, and against one that is built by hand."""

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import nn

from lora_core import (
    LoraConfig,
    combine_adapters,
    convert_adapter,
    count_parameters,
    delete_adapter,
    disable_adapters,
    extract_adapter,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    merge_checkpoint,
    mixed_batch,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_core.deploy.programs import findings
from lora_core.errors import ConfigError, StateError, TargetError
from tests.support import tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

RANGES = [[0, 2], [1, 3], [0, 1]]
ORDER = [0, 1, 1, 2, 0]
IDS = torch.tensor([[3, 4, 7, 9, 5, 6], [7, 9, 5, 7, 9, 6]])
SMALL = tiny.SMALL | {"num_hidden_layers": 3}
#: {architecture: (class, configuration, targets)}: the three kinds that PEFT knows, and two that it does not find.
MODELS = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
        ["q_proj", "down_proj"],
    ),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(
            **SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=3, max_window_layers=1
        ),
        ["q_proj", "v_proj"],
    ),
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**SMALL), ["query", "value"]),
    "gpt2, bare": (transformers.GPT2Model, transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=99), ["c_attn"]),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=99), ["c_attn"]),
    "opt": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=99, word_embed_proj_dim=32
        ),
        ["q_proj"],
    ),
}
OF_PEFT = ["llama", "bert", "gpt2, bare"]


def build(architecture="llama"):
    kind, config, _ = MODELS[architecture]
    torch.manual_seed(0)
    return kind(copy.deepcopy(config)).eval()


def settings(architecture="llama", **others):
    return {"r": 4, "lora_alpha": 6, "target_modules": MODELS[architecture][2], "layer_replication": RANGES, **others}


def adapted(architecture="llama", model=None, name="default", seed=3, **others):
    model = build(architecture) if model is None else model
    inject(model, LoraConfig(**settings(architecture, **others)), name)
    return tiny.randomize(model, name, seed)


@torch.no_grad()
def output(model, **kwargs):
    made = model(input_ids=IDS, **kwargs)
    return made.logits if hasattr(made, "logits") else made.last_hidden_state


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def made_by_peft(directory, architecture="llama", **others):
    theirs = peft.get_peft_model(build(architecture), peft.LoraConfig(**settings(architecture, **others)))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(directory)
    return theirs.eval()


@pytest.mark.parametrize("architecture", OF_PEFT)
def test_files_go_both_ways(architecture, tmp_path):
    theirs = made_by_peft(tmp_path / "theirs", architecture)
    ours = build(architecture)
    report = load_adapter(ours, tmp_path / "theirs")
    assert len(report.targets) == 5 * len(MODELS[architecture][2])
    close(output(ours), output(theirs))
    save_adapter(ours, tmp_path / "ours")
    close(output(peft.PeftModel.from_pretrained(build(architecture), tmp_path / "ours").eval()), output(theirs))


@pytest.mark.parametrize("others", [{"bias": "lora_only"}, {"modules_to_save": ["norm"]}, {"use_dora": True}], ids=str)
@pytest.mark.filterwarnings("ignore:the base ties:UserWarning")
def test_files_of_what_is_trained_besides(others, tmp_path):
    architecture = "bert" if "bias" in others else "llama"
    theirs = made_by_peft(tmp_path / "theirs", architecture, **others)
    ours = build(architecture)
    load_adapter(ours, tmp_path / "theirs")
    close(output(ours), output(theirs))
    save_adapter(ours, tmp_path / "ours")
    close(output(peft.PeftModel.from_pretrained(build(architecture), tmp_path / "ours").eval()), output(theirs))


@pytest.mark.parametrize("architecture", MODELS)
def test_the_deeper_model_is_one_that_is_built_so(architecture):
    """Layers of one's own with these weights: the same output as long as B is zero, and when all is merged."""
    model = build(architecture)
    state, before = model.state_dict(), tiny.snapshot(model)
    kind, config, _ = MODELS[architecture]
    deeper = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        deeper.layer_types = [config.layer_types[i] for i in ORDER]
    deeper.num_hidden_layers = len(ORDER)
    by_hand = kind(deeper).eval()
    by_hand.load_state_dict({key: state[first(key)] for key in by_hand.state_dict()})
    inject(model, LoraConfig(**settings(architecture)))
    assert model.config.num_hidden_layers == 5 and MODELS[architecture][1].num_hidden_layers == 3
    torch.testing.assert_close(output(model), output(by_hand), rtol=0, atol=0)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == sum(t.numel() for t in unique(state))
    tiny.randomize(model)
    expected = output(model)
    with disable_adapters(model):
        torch.testing.assert_close(output(model), output(by_hand), rtol=0, atol=0)
    unload(model)
    assert tiny.snapshot(model) == before and model.config.num_hidden_layers == 3
    adapted(architecture, model)
    merge_and_unload(model)
    close(output(model), expected)
    by_hand.load_state_dict(model.state_dict())
    close(output(by_hand), expected)
    inside = [p for path, p in model.named_parameters(remove_duplicate=False) if ".0." in path or ".4." in path]
    assert len({p.data_ptr() for p in inside}) == len(inside)


def first(key):
    """The key of the tensor that is this one."""
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return key if at is None else ".".join([*parts[:at], str(ORDER[int(parts[at])]), *parts[at + 1 :]])


def unique(state):
    return {t.data_ptr(): t for t in state.values() if t.is_floating_point()}.values()


def test_layers_that_stand_nowhere_come_back():
    model = build()
    layers, before = list(model.model.layers), tiny.snapshot(model)
    inject(model, LoraConfig(**settings(layer_replication=[[1, 2], [1, 2]])))
    assert model.model.layers[0] is layers[1] and len(model.model.layers) == 2
    delete_adapter(model, "default")
    assert list(model.model.layers) == layers and tiny.snapshot(model) == before


def test_generation_with_a_cache():
    model = adapted("qwen2")
    kwargs = {
        "input_ids": IDS,
        "attention_mask": torch.ones_like(IDS),
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(model.generate(**kwargs), model.generate(**kwargs, use_cache=False))


def test_a_model_that_is_merged_for_good_is_a_checkpoint(tmp_path):
    model = adapted()
    expected = output(model)
    report = merge_and_unload(model)
    assert len(report.layers) == 10 and not report.untied
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 5 and again.lm_head.weight is again.model.embed_tokens.weight
    close(output(again), expected)


def test_merging_for_a_while():
    model = adapted()
    expected, weight = output(model), model.lm_head.weight
    merge_adapter(model)
    close(output(model), expected)
    assert model.config.tie_word_embeddings and model.lm_head.weight is weight
    with pytest.raises(StateError, match="would be saved as its base"):
        model.save_pretrained("nowhere")
    unmerge_adapter(model)
    assert torch.equal(output(model), expected)
    layers = model.model.layers
    assert layers[1].mlp.down_proj.weight is layers[2].mlp.down_proj.weight


def test_several_adapters(tmp_path):
    model = adapted(name="a")
    alone = output(model)
    adapted(model=model, name="b", seed=4)
    adapted(model=model, name="plain", seed=5, layer_replication=None)
    outputs = {}
    for name in ("a", "b", "plain"):
        set_adapter(model, name)
        outputs[name] = output(model)
        save_adapter(model, tmp_path / name, name)
        ours = build()
        load_adapter(ours, tmp_path / name)
        close(output(ours), outputs[name])
    assert torch.equal(outputs["a"], alone)
    with mixed_batch(model, ["b", "plain"]):
        close(output(model), torch.cat([outputs["b"][:1], outputs["plain"][1:]]))
    combine_adapters(model, ["a", "b"], [1, 1], "both")
    set_adapter(model, "both")
    save_adapter(model, tmp_path / "both", "both")
    ours = build()
    load_adapter(ours, tmp_path / "both")
    close(output(ours), output(model))
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "plain").eval()
    close(output(theirs), outputs["plain"])


def test_one_in_the_place_of_another(tmp_path):
    save_adapter(adapted(r=2), tmp_path / "deep")
    flat = build()
    inject(flat, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(tiny.randomize(flat), tmp_path / "flat")
    model = adapted()
    load_adapter(model, tmp_path / "deep", replace=True)
    close(output(model), output(adapted(r=2)))
    load_adapter(model, tmp_path / "flat", replace=True)
    assert len(model.model.layers) == 3
    close(output(model), output(flat))


def test_each_layer_is_trained_by_itself():
    model = adapted()
    plain = build()
    inject(plain, LoraConfig(**settings(layer_replication=None)))
    assert count_parameters(model).trainable * 3 == count_parameters(plain).trainable * 5
    output_before = output(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    layers = model.model.layers
    A = [layer.self_attn.q_proj.lora_A["default"] for layer in layers]
    assert all(a.grad.abs().max() > 0 for a in A) and not torch.equal(A[1].grad, A[2].grad)
    assert not torch.equal(output(model), output_before)


def test_a_copy_of_the_model():
    model = adapted()
    other = copy.deepcopy(model)
    unload(model)
    close(output(other), output(adapted()))
    unload(other)
    assert torch.equal(output(other), output(model)) and len(other.model.layers) == 3


# --- what is refused --------------------------------------------------------------------------------------------------


def test_files_can_not_be_merged(tmp_path):
    save_adapter(adapted(use_dora=True), tmp_path / "adapter")
    build().save_pretrained(tmp_path / "base")
    for refused in (
        lambda: merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged"),
        lambda: convert_adapter(tmp_path / "adapter", tmp_path / "plain", plain=True, base=tmp_path / "base"),
        lambda: convert_adapter(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=tmp_path / "base"),
    ):
        with pytest.raises(ConfigError, match=r"is for a model whose layers are replicated .* merge_and_unload\(model\)"):
            refused()
    assert "builds no model of replicated layers" in str(findings(tmp_path / "adapter", "vllm")[-1])
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "base"}


def test_a_model_with_adapters_is_not_made_another():
    model = build()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]), "a")
    before = tiny.snapshot(model)
    with pytest.raises(
        ConfigError, match=r"layer_replication=\[\[0, 2\], \[1, 3\], \[0, 1\]\] makes another model.* holds 'a'"
    ):
        inject(model, LoraConfig(**settings()), "b")
    assert tiny.snapshot(model) == before
    with pytest.raises(ConfigError, match="makes another model, and this one holds 'a'"):
        inject(adapted(name="a"), LoraConfig(**settings(layer_replication=[[0, 1]])), "b")


@pytest.mark.parametrize("value", [[[1, 1]], [[2, 1]], [[0]], [[0, 1.0]], [[-1, 1]], [0, 4], "0-4", [[False, True]]], ids=str)
def test_ranges_are_checked(value):
    with pytest.raises(ConfigError, match=r"layer_replication must be a list of pairs \[start, end\)"):
        LoraConfig(r=2, layer_replication=value)


def test_ranges_of_more_layers_than_there_are():
    model = build()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=r"names layer 3 of 'model.layers', which has 3 layers, from 0 on"):
        inject(model, LoraConfig(**settings(layer_replication=[[2, 4]])))
    assert tiny.snapshot(model) == before


def test_after_an_error_the_model_is_as_deep_as_it_was():
    model = build()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match="closest"):
        inject(model, LoraConfig(**settings(target_modules=["q_prj"])))
    assert tiny.snapshot(model) == before and model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("build", "which"),
    [
        (lambda: tiny.build("t5"), r"these are: encoder\.block\.0\.layer, "),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "there is none"),
    ],
    ids=["several", "none"],
)
def test_a_model_without_one_stack(build, which):
    with pytest.raises(TargetError, match=f"needs one stack of layers, called layers or layer or h or blocks, and {which}"):
        inject(build(), LoraConfig(r=2, target_modules="all-linear", layer_replication=[[0, 1]]))


def test_a_stack_that_was_changed_since():
    model = adapted()
    model.model.layers.append(nn.Identity())
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match=r"'model.layers' has 6 layers, and layer_replication made 5; put them back"):
        unload(model)
    assert tiny.snapshot(model) == before


def test_nothing_is_extracted_from_one():
    config = LoraConfig(**settings())
    with pytest.raises(ConfigError, match="layer_replication: tuned has the layers that model has"):
        extract_adapter(build(), build(), config)
    assert dataclasses.replace(config, layer_replication=None).layer_replication is None
