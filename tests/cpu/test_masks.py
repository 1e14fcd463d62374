"""Dropout masks of layers: independent of each other, and shared only where `share_dropout_masks` was called, and narrowly."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lora_core import LoraConfig, LoraError, delete_adapter, inject, share_dropout_masks, unload
from lora_core.cpu.masks import same_shared_mask
from tests.support import tiny


class Siblings(nn.Module):
    """Three layers that read one tensor; with W = 0 and A = B = 1 each gives dropout(x) itself."""

    def __init__(self, read=lambda self, x: [self.q(x), self.k(x), self.v(x)]):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.read = read

    def forward(self, x):
        return self.read(self, x)


def identity(model, p=0.5):
    inject(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=p, target_modules=["q", "k", "v"]))
    for layer in (model.q, model.k, model.v):
        for t in (layer.weight, layer.bias):
            nn.init.zeros_(t)
        for t in (layer.lora_A["default"], layer.lora_B["default"]):
            nn.init.eye_(t)
    return model


def shared(*args):
    model = identity(Siblings(*args))
    assert share_dropout_masks(model) == 3
    return model


def same(*outputs):
    first, *others = (y.detach() != 0 for y in outputs)
    return all(torch.equal(first, other) for other in others)


X = torch.rand(64, 16) + 1


# --- by default -----------------------------------------------------------------------------------------------------


def test_masks_are_independent_by_default():
    q, k, v = identity(Siblings())(X)
    for a, b in ((q, k), (k, v), (q, v)):
        agreement = ((a != 0) == (b != 0)).float().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / X.numel() ** 0.5  # of independent halves
    assert not same(*(identity(Siblings())(X)[0] for _ in range(2)))  # nor do two models share


def test_values_are_read_anew_by_each_layer():
    """x rewritten behind autograd's back, without a new version."""

    def read(self, x):
        first = self.q(x)
        x.data.mul_(2)
        return first, self.k(x)

    for model in (identity(Siblings(read)), shared(read)):
        x = X.clone()
        first, second = model(x)
        assert set(first[first != 0].unique().tolist()) <= set((X * 2).unique().tolist())  # 1 / 0.5 = 2
        assert set(second[second != 0].unique().tolist()) <= set((X * 4).unique().tolist())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("build", [identity, lambda m: shared(m.read)], ids=["independent", "shared"])
@pytest.mark.parametrize("inside", ["", "q", "k", "v", "qk", "kv", "qv", "qkv", "whole", "whole, q", "whole, k", "whole, qk"])
def test_gradients_use_the_masks_of_the_forward(build, inside, reentrant):
    """Whichever of the siblings are checkpointed, alone, together or inside of a checkpoint of their parent."""

    def run(self, x, names):
        return torch.stack([getattr(self, name)(x) for name in names])

    def read(self, x):
        names = inside.removeprefix("whole").lstrip(", ")
        rest = [n for n in "qkv" if n not in names]
        parts = [checkpoint(run, self, x, names, use_reentrant=reentrant)] if names else []
        parts += [run(self, x, rest)] if rest else []
        order = [*names, *rest]
        return torch.cat(parts)[[order.index(n) for n in "qkv"]]

    torch.manual_seed(0)
    model = build(Siblings(read))
    x = X.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=reentrant) if inside.startswith("whole") else model(x)
    weights = torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    (y * weights).sum().backward()
    expected = ((y.detach() != 0) * 2 * weights).sum(0)
    torch.testing.assert_close(x.grad, expected)


def test_t5_under_its_own_checkpointing():
    """Its decoder's layers read one tensor, the encoder's output, each in a checkpoint of its own."""
    torch.manual_seed(0)
    model = tiny.build("t5")
    inject(model, LoraConfig(r=4, lora_dropout=0.3, target_modules=["q", "k", "v"]))
    tiny.randomize(model)
    share_dropout_masks(model)
    found = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        again = copy.deepcopy(model).train()
        if kwargs is not None:
            again.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            again.enable_input_require_grads()
        torch.manual_seed(7)
        again(**tiny.inputs(again), labels=tiny.TOKENS).loss.backward()
        found.append([p.grad for p in again.parameters() if p.requires_grad])
    for one in found[1:]:
        for a, b in zip(found[0], one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_selective_checkpointing_works():
    """It keeps results of single operations, and refuses those that were changed in place."""
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)
    model, plain = tiny.classifier(), tiny.classifier()
    for m in (model, plain):
        inject(m, LoraConfig(r=2, target_modules=["q", "v"]))
        tiny.randomize(m)
    x = tiny.batch().requires_grad_()
    contexts = lambda: create_selective_checkpoint_contexts(list(kept))  # noqa: E731
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    mine, x.grad = x.grad, None
    plain(x).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)


# --- shared ---------------------------------------------------------------------------------------------------------


def test_siblings_that_read_one_tensor_share_and_the_next_pass_draws_again():
    model = shared()
    first, second = model(X), model(X)
    assert same(*first) and same(*second) and not same(first[0], second[0])


def test_what_is_not_alike_does_not_share():
    cases = {
        "another tensor": lambda self, x: [self.q(x), self.k(x.clone())],
        "a view": lambda self, x: [self.q(x), self.k(x.view(64, 16))],
        "a new version": lambda self, x: [self.q(x), self.k(x.add_(1))],
        "read again": lambda self, x: [self.q(x), self.q(x)],
        "another tensor between": lambda self, x: [self.q(x), (self.k(x + 1), self.v(x))[1]],
        "drawn between": lambda self, x: [self.q(x), (torch.rand(1), self.k(x))[1]],
        "reseeded between": lambda self, x: [self.q(x), (torch.manual_seed(3), self.k(x))[1]],
    }
    for name, read in cases.items():
        assert not same(*shared(read)(X.clone())), name
    model = shared()
    assert not same(model.q(X), model.k(X))  # not in a forward of their parent
    with torch.inference_mode():
        assert not same(*shared()(torch.rand(64, 16) + 1))
    model.k.lora_dropout["default"] = 0.25
    assert not same(*model(X)[:2])


def test_a_reseeded_generator_gives_the_same_masks_again():
    model, found = shared(), []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(model(X)[0])
    assert torch.equal(*found)


def test_layers_of_two_parents_and_two_models_do_not_share():
    blocks = nn.ModuleList([Siblings(), Siblings()])
    inject(blocks, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q", "k", "v"], init_lora_weights=False))
    assert share_dropout_masks(blocks) == 6 and blocks[0].q.lora_masks is not blocks[1].q.lora_masks
    first, second = shared(), shared()
    assert not same(first(X)[0], second(X)[0])


def test_layers_in_a_container_without_a_forward_are_not_counted():
    """Nothing says when a list's forward is under way, so its layers can't share, whatever reads them."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return [expert(x) for expert in self.experts]

    model = Experts()
    inject(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["0", "1", "2"], init_lora_weights=False))
    assert share_dropout_masks(model) == 0
    assert not model.experts._forward_pre_hooks and model.experts[0].lora_masks is None


def test_threads_share_nothing():
    model, found = shared(lambda self, x: [self.q(x)]), []
    threads = [threading.Thread(target=lambda: found.extend(model(X))) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert not same(*found)


def test_gradients_of_shared_masks_are_those_of_plain_operations():
    torch.manual_seed(0)
    model = shared().double()
    x = X.double().requires_grad_()
    q, k, v = model(x)
    (q.square().sum() + k.sin().sum() + v.cos().sum()).backward()
    mask = (q.detach() != 0).double() * 2
    y = (X.double() * mask).requires_grad_()
    (y.square().sum() + y.sin().sum() + y.cos().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad * mask, rtol=1e-12, atol=1e-12)


def test_copies_and_pickles_share_among_themselves():
    model = shared()
    model(X)
    with torch.no_grad():
        model.read = None
        other = copy.deepcopy(model)
        third = pickle.loads(pickle.dumps(model))
    for m in (model, other, third):
        m.read = Siblings().read
    assert len({id(m.q.lora_masks) for m in (model, other, third)}) == 3
    outputs = [m(X) for m in (model, other, third)]
    assert all(same(*found) for found in outputs) and not same(outputs[0][0], outputs[1][0], outputs[2][0])
    unload(other)
    assert same(*model(X))


def test_nothing_is_left_after_unloading():
    model = Siblings()
    before = tiny.snapshot(model)
    inject(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q", "k"]), "a")
    inject(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["k", "v"]), "b")
    assert share_dropout_masks(model) == 3 and share_dropout_masks(model) == 3 and len(model._forward_pre_hooks) == 1
    delete_adapter(model, "a")
    assert model.k.lora_masks.layers == [model.k, model.v] and len(model._forward_pre_hooks) == 1
    unload(model)
    assert tiny.snapshot(model) == before
    with pytest.raises(LoraError, match="holds no adapters"):
        share_dropout_masks(model)


def test_neither_x_nor_masks_are_kept_alive():
    model, x = shared(), torch.rand(64, 16)
    gone = weakref.ref(x)
    model(x)
    del x
    gc.collect()
    assert gone() is None and not model.q.lora_masks.forwards
    source = torch.zeros(4, dtype=torch.int64)
    mask = weakref.ref(same_shared_mask(source, (50, 10), 0.5, source.device))
    assert mask() is not None
    del source
    gc.collect()
    assert mask() is None


def test_an_error_in_the_forward_closes_it():
    def read(self, x):
        self.q(x)
        raise ZeroDivisionError

    model = shared(read)
    with pytest.raises(ZeroDivisionError):
        model(X)
    assert not model.q.lora_masks.forwards and not same(model.q(X), model.k(X))


def test_a_compiled_model_draws_alone():
    torch._dynamo.reset()
    model = shared()
    q, k, v = torch.compile(model, backend="eager")(X)
    assert not same(q, k) and not same(k, v)


def test_several_active_adapters_have_masks_of_their_own():
    from lora_core import set_adapter

    model = identity(Siblings(lambda self, x: [self.q(x)]))
    inject(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0.5, target_modules=["q"]), "b")
    for t in (model.q.lora_A["b"], model.q.lora_B["b"]):
        nn.init.eye_(t)
    set_adapter(model, ["default", "b"])
    (y,) = model(X)
    shares = [(y == 0).float().mean().item(), (y > 0).float().mean().item()]
    assert abs(shares[0] - 0.25) < 0.06 and abs(shares[1] - 0.75) < 0.06  # 5 standard deviations of 1,024 elements


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_real_models_share_in_attention(settings):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**tiny.SMALL))
    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["query", "key", "value"], **settings)
    inject(model, config)
    assert share_dropout_masks(model) == 6
    drawn = []
    import lora_core.cpu.masks as engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "draw_keep_mask", lambda *a, f=engine.draw_keep_mask: drawn.append(a) or f(*a))
        model.train()(input_ids=tiny.TOKENS)
    assert len(drawn) == 2  # one for each attention
