"""Activated LoRA against its equation, token by token in float64, and against PEFT: forward, generation, training, files."""

import copy
import io

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    combine_adapters,
    convert_adapter,
    count_parameters,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    merge_checkpoint,
    mixed_batch,
    quantize_nf4,
    rename_adapter,
    save_adapter,
    set_adapter,
    unload,
)
from lora_core.deploy.inspection import inspect_adapter
from lora_core.deploy.programs import findings
from lora_core.errors import AdapterNameError, ConfigError, StateError, TargetError
from lora_core.methods.activated import READ
from tests.support import tiny

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.checkpoint"),
]

INVOCATION = [7, 9]
#: Of two beginnings the last one counts; one row has none, one is cut off, and one invokes with its last tokens.
IDS = torch.tensor(
    [
        [3, 4, 7, 9, 5, 6, 8, 2],
        [7, 9, 5, 7, 9, 6, 8, 2],
        [3, 4, 9, 7, 5, 6, 8, 2],
        [9, 7, 4, 9, 5, 6, 8, 7],
        [3, 4, 2, 8, 5, 6, 7, 9],
    ]
)
BEGINS = [2, 3, None, None, 6]
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
PLAIN = {"r": 2, "target_modules": ["q_proj"]}


def adapted(name="default", model=None, seed=3, **settings):
    model = tiny.build("llama") if model is None else model
    inject(model, LoraConfig(**SETTINGS | settings), name)
    return tiny.randomize(model, name, seed)


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@torch.no_grad()
def cache_of(model, ids):
    return model(input_ids=ids, use_cache=True).past_key_values


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# --- the equation -----------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Token ids, N T, -> vectors -> a linear layer, N T 6."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embed, self.linear = nn.Embedding(20, 5, dtype=dtype), nn.Linear(5, 6, dtype=dtype)

    def forward(self, ids):
        return self.linear(self.embed(ids))


def reader(dtype=torch.float64, invocations=(INVOCATION,), **settings):
    torch.manual_seed(0)
    model = Reader(dtype).eval()
    for name, invocation in zip("abc", invocations, strict=False):
        inject(model, LoraConfig(r=2, target_modules=["linear"], alora_invocation_tokens=invocation, **settings), name)
        tiny.randomize(model, name, seed=ord(name))
    return model


def by_hand(model, name, row, t):
    """s B A x of the token at t, or zeros before the last place where the invocation stands."""
    layer, tokens = model.linear, row.tolist()
    sought = layer.lora_invocation[name].tolist()
    begins = max((i for i in range(len(tokens)) if tokens[i : i + len(sought)] == sought), default=len(tokens))
    if t < begins:
        return torch.zeros(6, dtype=torch.float64)
    x = model.embed.weight[tokens[t]].double()
    return layer.lora_scaling[name] * layer.lora_B[name].double() @ (layer.lora_A[name].double() @ x)


@pytest.mark.parametrize("invocation", [[7, 9], [7], [9, 9], [6, 8, 2], list(range(9))], ids=str)
@torch.no_grad()
def test_the_adapter_acts_from_the_last_invocation_on(invocation):
    model = reader(invocations=[invocation])
    base = model.linear.lora_base_class.forward(model.linear, model.embed(IDS))
    update = torch.stack([torch.stack([by_hand(model, "a", row, t) for t in range(8)]) for row in IDS])
    torch.testing.assert_close(model(IDS), base + update, rtol=0, atol=1e-12)
    assert torch.equal(model(ids=IDS), model(IDS))  # whatever the model calls its first argument
    assert bool(update.any()) == (invocation not in ([9, 9], list(range(9))))


@torch.no_grad()
def test_each_of_several_acts_from_its_own_invocation_on():
    model = reader(invocations=[[7, 9], [6]])
    inject(model, LoraConfig(r=2, target_modules=["linear"], use_dora=True, init_lora_weights=False), "dora")
    set_adapter(model, "dora")
    others = model(IDS)
    set_adapter(model, ["a", "dora", "b"])
    update = torch.stack([torch.stack([by_hand(model, "a", r, t) + by_hand(model, "b", r, t) for t in range(8)]) for r in IDS])
    torch.testing.assert_close(model(IDS), others + update, rtol=0, atol=1e-12)


@torch.no_grad()
def test_in_16_bits_the_sum_is_rounded_once():
    model = reader(torch.bfloat16)
    x = model.embed(IDS)
    base = nn.functional.linear(x, model.linear.weight, model.linear.bias)
    update = torch.stack([torch.stack([by_hand(model, "a", row, t) for t in range(8)]) for row in IDS])
    expected = (base.float() + update.float()).bfloat16()
    y = model(IDS)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def made_by_peft(directory, architecture="llama", **settings):
    theirs = peft.get_peft_model(tiny.build(architecture), peft.LoraConfig(**SETTINGS | settings))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(directory)
    return theirs.eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}, {"alora_invocation_tokens": [9]}, {"modules_to_save": ["norm"]}],
    ids=str,
)
def test_files_go_both_ways(settings, tmp_path):
    theirs = made_by_peft(tmp_path / "theirs", **settings)
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    assert (logits(ours) - logits(tiny.build("llama"))).abs().amax() > 0.1
    save_adapter(ours, tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "ours").eval()), logits(theirs))


def test_the_layers_of_gpt2_too(tmp_path):
    theirs = made_by_peft(tmp_path, "gpt2", target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    ours = tiny.build("gpt2")
    load_adapter(ours, tmp_path)
    close(logits(ours), logits(theirs))


@pytest.mark.filterwarnings("ignore:.*attention mask:UserWarning")
@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_generation_with_a_cache_is_pefts(kwargs, tmp_path):
    theirs = made_by_peft(tmp_path)
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path)
    kwargs |= {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "output_logits": True, "pad_token_id": 0}
    made = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        made.append(model.generate(input_ids=IDS, return_dict_in_generate=True, **kwargs))
    assert torch.equal(made[0].sequences, made[1].sequences)
    close(torch.stack(made[1].logits), torch.stack(made[0].logits))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoints", "reentrant checkpoints"])
def test_gradients_are_pefts(checkpointing, tmp_path):
    theirs = made_by_peft(tmp_path)
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path, trainable=True)
    ours.train()
    if checkpointing is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        ours.enable_input_require_grads()
    for model in (theirs, ours):
        for ids in (IDS, IDS.flip(0)):  # one after the other: a checkpoint must find its own text
            model(input_ids=ids, labels=ids).loss.backward()
    theirs = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            match = theirs["base_model.model." + name.replace(".default", ".default.weight")]
            assert match.abs().max() > 0
            torch.testing.assert_close(p.grad, match, rtol=0, atol=1e-5)


def test_two_forwards_before_a_backward_with_checkpoints_are_told_apart():
    model = adapted().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(input_ids=IDS, labels=IDS).loss + model(input_ids=IDS.flip(0), labels=IDS).loss
    with pytest.raises(StateError, match=r"checkpointing needs the backward of each forward before the next one"):
        loss.backward()
    with torch.no_grad():
        model(input_ids=IDS.flip(0))
    model(input_ids=IDS, labels=IDS).loss.backward()  # what was evaluated in between is none


# --- caches -----------------------------------------------------------------------------------------------------------


def test_a_loop_of_one_s_own_gives_what_the_whole_text_gives():
    model, ids = adapted(), torch.cat([IDS, IDS.flip(1)], 1)
    cache = cache_of(model, ids[:, :8])
    parts = [logits(model, ids[:, 8:12], past_key_values=cache), logits(model, ids[:, 12:], past_key_values=cache)]
    # In row 1 the last invocation is in the second half, so that its first half would not be what was computed before it.
    close(torch.cat(parts, 1)[[0, 2]], logits(model, ids)[[0, 2], 8:])


def test_a_tuple_of_outputs_has_the_cache_too():
    model = adapted()
    cache = model(input_ids=IDS, use_cache=True, return_dict=False)[1]
    assert torch.equal(getattr(cache, READ), IDS)


def test_what_is_generated_does_not_invoke():
    """As in PEFT: the tokens of the invocation, one by one, are what the model has said."""
    model, base = adapted(), tiny.build("llama")
    text = torch.tensor([[3, 4, 5, 7, 9, 2]])
    cache, other = (cache_of(m, text[:, :3]) for m in (model, base))
    for t in range(3, 6):
        close(logits(model, text[:, t : t + 1], past_key_values=cache), logits(base, text[:, t : t + 1], past_key_values=other))
    assert (logits(model, text) - logits(base, text)).abs().max() > 0.01


@pytest.mark.parametrize("how", ["disabled", "another model", "another adapter", "a copy"])
def test_a_cache_that_was_filled_before_the_invocation_serves(how):
    model, text, new = adapted(), torch.tensor([[3, 4, 5]] * 2), torch.tensor([[7, 9, 1, 2], [4, 7, 9, 2]])
    filling = tiny.build("llama") if how == "another model" else model
    if how == "disabled":
        with disable_adapters(model):
            cache = cache_of(model, text)
    else:
        cache = cache_of(filling, text)
    if how == "another adapter":
        adapted("other", model, seed=5, alora_invocation_tokens=[2])
        set_adapter(model, "other")
        inject(model, LoraConfig(**PLAIN | {"target_modules": ["k_proj"]}), "plain")
        set_adapter(model, "default")
    cache = copy.deepcopy(cache) if how == "a copy" else cache
    close(logits(model, new, past_key_values=cache), logits(model, torch.cat([text, new], 1))[:, 3:])


def test_a_cache_remembers_through_copies_crops_and_more_rows():
    model = adapted()
    cache = cache_of(model, IDS[:1])
    more = copy.deepcopy(cache)
    more.batch_repeat_interleave(2)
    new = torch.tensor([[4], [5]])
    expected = logits(model, torch.cat([IDS[:1].expand(2, -1), new], 1))[:, -1:]
    close(logits(model, new, past_key_values=more), expected)
    cache.crop(-6)  # to before the invocation
    text = torch.cat([IDS[:1, :2], new[:1]], 1)
    close(logits(model, new[:1], past_key_values=cache), logits(tiny.build("llama"), text)[:, -1:])
    with pytest.raises(StateError, match="the cache is of 2 rows, and input_ids of 3"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=more)


@pytest.mark.filterwarnings("ignore:.*attention mask:UserWarning")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 2},
    ],
    ids=str,
)
def test_generation_of_every_kind_is_that_without_a_cache(kwargs):
    model, ids = adapted(), IDS[:1] if "prompt_lookup_num_tokens" in kwargs else IDS[:3]
    kwargs |= {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    without = {
        k: v for k, v in kwargs.items() if k not in ("cache_implementation", "prompt_lookup_num_tokens", "prefill_chunk_size")
    }
    expected = model.generate(input_ids=ids, use_cache=False, **without)
    rows = [0] if kwargs.get("prefill_chunk_size") else range(len(expected))  # which cuts the invocation of row 1
    assert torch.equal(model.generate(input_ids=ids, **kwargs)[rows], expected[rows])


def test_a_head_that_reads_the_last_token_alone():
    model = adapted()
    close(logits(model, logits_to_keep=1), logits(model)[:, -1:])


# --- as other adapters ------------------------------------------------------------------------------------------------


def test_it_comes_is_switched_renamed_copied_and_goes():
    model = tiny.build("llama")
    before, plain = tiny.snapshot(model), logits(model)
    adapted("a", model)
    alone = logits(model)
    adapted("b", model, seed=4, alora_invocation_tokens=[5, 6])
    assert torch.equal(logits(model), alone)
    with disable_adapters(model):
        assert torch.equal(logits(model), plain)
    rename_adapter(model, "a", "c")
    assert torch.equal(logits(model), alone)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), alone)
        unload(other)
        assert torch.equal(logits(other), plain) and not other._forward_pre_hooks
    assert torch.equal(logits(model), alone)
    inject(model, LoraConfig(**PLAIN), "plain")
    assert delete_adapter(model, "c") == ()
    assert model.lm_head.lora_reader is model.lora_registry.text and torch.equal(logits(model), plain)
    delete_adapter(model, "b")
    assert model.model.layers[0].self_attn.q_proj.lora_reader is None and not model._forward_pre_hooks
    delete_adapter(model, "plain")
    adapted("b", model, seed=4, alora_invocation_tokens=[5, 6])
    set_adapter(model, "b")
    acts = (logits(model) - plain).abs().amax(-1) > 0
    assert acts[[0, 2, 3, 4], 4:].all() and not acts[:, :4].any() and not acts[1].any()
    unload(model)
    assert tiny.snapshot(model) == before and torch.equal(logits(model), plain)


def test_it_is_trained_and_counted_as_lora():
    model, plain = adapted(), tiny.build("llama")
    inject(plain, LoraConfig(**{k: v for k, v in SETTINGS.items() if not k.startswith("alora")}))
    assert count_parameters(model).trainable == count_parameters(plain).trainable


def test_on_a_base_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny.build("llama")
    quantize_nf4(model, skip=["lm_head"])
    base = logits(model)
    adapted(model=model)
    changed = (logits(model) - base).abs().amax(-1) > 0
    expected = [[begins is not None and t >= begins for t in range(8)] for begins in BEGINS]
    assert changed.tolist() == expected


def test_rows_of_a_batch_with_adapters_of_their_own():
    model = adapted("a")
    adapted("b", model, seed=4, alora_invocation_tokens=[5, 6], target_modules=["q_proj", "o_proj"])
    inject(model, LoraConfig(**PLAIN, use_dora=True, init_lora_weights=False), "dora")
    names = ["a", "b", None, "dora", "a"]
    expected = []
    for row, name in zip(IDS, names, strict=True):
        set_adapter(model, [] if name is None else name)
        expected.append(logits(model, row[None]))
    with mixed_batch(model, names):
        cache = cache_of(model, IDS[:, :6])
        rest = torch.cat([logits(model, IDS[:, t : t + 1], past_key_values=cache) for t in (6, 7)], 1)
        close(logits(model), torch.cat(expected))
    close(rest[:4], torch.cat(expected)[:4, 6:])  # in the last row those two would be the invocation


# --- what is refused --------------------------------------------------------------------------------------------------


def test_no_weight_holds_it(tmp_path):
    model = adapted()
    adapted("b", model)
    save_adapter(model, tmp_path / "adapter")
    tiny.build("llama").save_pretrained(tmp_path / "base")
    before = tiny.snapshot(model)
    why = "is activated LoRA, which acts on some tokens alone, which no weight can hold; keep it beside the base"
    for refused in (
        lambda: merge_adapter(model),
        lambda: merge_and_unload(model),
        lambda: combine_adapters(model, ["default", "b"], [1, 1], "sum"),
        lambda: merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged"),
        lambda: convert_adapter(tmp_path / "adapter", tmp_path / "plain", plain=True),
        lambda: convert_adapter(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=tmp_path / "base"),
    ):
        with pytest.raises(ConfigError, match=why):
            refused()
    assert tiny.snapshot(model) == before and {p.name for p in tmp_path.iterdir()} == {"adapter", "base"}


def test_inspect_says_what_it_is(tmp_path):
    save_adapter(adapted(), tmp_path)
    assert "activated LoRA" in str(inspect_adapter(tmp_path))
    assert "reads activated LoRA as plain LoRA" in str(findings(tmp_path, "vllm")[0])
    assert "convert_lora_to_gguf" in str(findings(tmp_path, "llama.cpp")[0])
    assert not findings(tmp_path, "peft")


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is no linear layer, and activated LoRA"),
        ("convnet", {"target_modules": ["conv1d"]}, "conv1d' is no linear layer, and activated LoRA is for those"),
        ("t5", {"target_modules": ["q"], "task_type": None}, "reads one text and writes another"),
    ],
)
def test_where_there_is_no_text_it_is_not_added(architecture, settings, message):
    model = tiny.build(architecture)
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=message):
        inject(model, LoraConfig(**SETTINGS | settings))
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("value", ["7", 7, [7, -1], [True], [1.5], [2**31], {7}], ids=str)
def test_an_invocation_is_a_list_of_tokens(value):
    with pytest.raises(ConfigError, match=r"alora_invocation_tokens must be a list of token ids, such as \[529, 9\]"):
        LoraConfig(r=2, alora_invocation_tokens=value)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_it_goes_with_no_other_method(field):
    with pytest.raises(ConfigError, match="goes with neither use_dora nor lora_bias"):
        LoraConfig(r=2, alora_invocation_tokens=[1], **{field: True})


def test_without_token_ids_it_is_not_known_where_to_act():
    model = adapted()
    embedded = model.model.embed_tokens(IDS)
    for call in (
        lambda: model(inputs_embeds=embedded),
        lambda: model.model(input_ids=IDS),
        lambda: model(input_ids=IDS[0][None, None]),
    ):
        with pytest.raises(StateError, match="looks for its invocation in the model's input_ids"):
            call()
    with disable_adapters(model):
        model(inputs_embeds=embedded)


def test_a_layer_that_reads_no_tokens_is_told():
    model = Reader()
    model.forward = lambda ids: model.linear(model.embed(ids).mean(1))
    inject(model, LoraConfig(r=2, target_modules=["linear"], alora_invocation_tokens=[1]))
    with pytest.raises(StateError, match=r"a layer that reads \(5, 5\) where the model reads 5 rows of 8 tokens"):
        model(IDS)


def test_a_cache_that_can_not_be_told_is_refused():
    model = adapted()
    with pytest.raises(StateError, match="keeps on the cache what was read, and a tuple can't"):
        model(input_ids=IDS, past_key_values=((1,),))


def test_another_invocation_is_another_adapter(tmp_path):
    save_adapter(adapted(), tmp_path)
    model = adapted(alora_invocation_tokens=[1, 2])
    with pytest.raises(AdapterNameError, match="of other layers or ranks"):
        load_adapter(model, tmp_path)
    load_adapter(model, tmp_path, replace=True)
    assert torch.equal(logits(model), logits(adapted()))
