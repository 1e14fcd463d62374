"""A batch whose rows use different adapters, in one forward pass.

    with mixed_batch(model, ["film", "food", None]):      # three rows, the last with the base alone
        logits = model(**inputs).logits

On each layer the adapters' A and B, padded to one rank, are stacked once; a forward gathers those of its rows and multiplies
them in one batched product, however many adapters there are (as S-LoRA does on a GPU, arXiv 2311.03285). Heads and other
modules that the adapters trained whole run with each row's own weights. It holds for the thread that opened it: several
threads can run one model, each with its own mix. Meanwhile the model's adapters can't be changed, by any thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..errors import StateError
from ..layers.rows import check_rows, stack
from .atomic import insist
from .copies import copy_of, original_of, own_keys, without_copies
from .registry import Adapter, Registry, adapter_layers, find_adapter, registry_of, unwrap


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """A context in which row n of a batch uses the adapter `names[n]`, or the base alone where that is None.

    For inference, with any kind of adapter: the adapters get no gradients, and the active ones play no part. The first
    dimension of what every adapted layer reads must be the rows.

    Args:
        model: a model in eval mode that holds the adapters.
        names: a name or None for each row of the batches to come.

    Raises:
        AdapterNameError: a name is not on the model.
        StateError: the model is in training mode, an adapter trains biases of the base or rows of its embeddings, or this
            thread is in a mixed batch already or in `disable_adapters`; and in the forward, if an input has not as many
            rows as `names`; adapters are folded into the weights now.
    """
    if isinstance(names, str) or not names:
        raise StateError(f"names must hold an adapter or None for each row of the batch, not {names!r}")
    root, registry, thread = unwrap(model), registry_of(model), get_ident()
    chosen = [name for name in dict.fromkeys(names) if name is not None]
    for name in dict.fromkeys((*chosen, *registry.active)):
        _refuse_shared(name, find_adapter(root, name))
    layers = {layer: None for adapter in registry.adapters.values() for _, layer in adapter_layers(root, adapter)}
    for name in chosen:
        for path, layer in adapter_layers(root, find_adapter(root, name)):
            if not layer.mixes:
                kind = layer.lora_base_class.__name__
                raise StateError(f"adapter {name!r} is on {path}, a {kind}, whose rows share a weight; run each by itself")
    if root.training:
        raise StateError("mixed batches are for inference; call model.eval() first")
    if any(layer.lora_folded for layer in layers):
        raise StateError("adapters are folded into the weights; call unmerge_adapter(model) before a mixed batch")
    if thread in registry.disabled.values():
        raise StateError("this thread is in disable_adapters, and a mixed batch would apply adapters; leave that first")
    if thread in registry.mixing:
        raise StateError("this thread is in a mixed batch already; leave it before the next")

    index = torch.tensor([len(chosen) if name is None else chosen.index(name) for name in names], device="cpu")
    groups = [(index == k).nonzero().flatten() for k in range(len(chosen) + 1)]
    grouped = pad_sequence(groups, batch_first=True)
    place = torch.empty_like(index)
    for k, group in enumerate(groups):
        place[group] = k * grouped.shape[1] + torch.arange(len(group), device="cpu")
    undo = ExitStack()
    try:
        try:
            undo.callback(registry.mixing.discard, thread)
            registry.mixing.add(thread)
            for layer in layers:
                undo.callback(layer.lora_rows.pop, thread, None)
                layer.lora_rows[thread] = stack(layer, chosen, (index, grouped, place))
            for path in dict.fromkeys(path for adapter in registry.adapters.values() for path in adapter.saved_modules):
                hook = _row_hook(path, root.get_submodule(path), _stack_copies(root, registry, path, chosen), index, thread)
                undo.callback(root.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
            yield
        finally:
            insist(undo.close)
    finally:  # an interruption may come just before the line above
        insist(undo.close)


def _refuse_shared(name: str, adapter: Adapter) -> None:
    """Raises a StateError for an adapter that has tensors of its own which can't differ from row to row."""
    for path in adapter.copied:
        if not any(path.startswith(f"{module}.") for module in adapter.saved_modules):
            what = "has embeddings of its own" if path in adapter.kept else "trains a bias of the base"
            raise StateError(f"adapter {name!r} {what}, {path!r}, which all rows of a batch share")
    if adapter.tokens:
        raise StateError(f"adapter {name!r} trains tokens of {adapter.tokens[0]!r}, which all rows of a batch share")


def _stack_copies(root: nn.Module, registry: Registry, module: str, names: Sequence[str]) -> dict[str, Tensor]:
    """{tensor of the module: (K, ...), that of each adapter, and last the base's own}."""
    stacked = {}
    for key in own_keys(root.get_submodule(module)):
        path = f"{module}.{key}"
        base = original_of(root, path).detach()
        copies = {name: copy_of(root, name, path).detach() for name in names if path in registry.adapters[name].copied}
        like = next(iter(copies.values()), base).to(base.device)  # in float32 beside a 16-bit base
        stacked[key] = torch.stack([copies.get(name, base).to(like) for name in names] + [base.to(like)])
    return stacked


def _row_hook(path: str, module: nn.Module, stacked: dict[str, Tensor], index: Tensor, thread: int) -> Callable:
    """A forward hook that runs `module` on each row with that row's tensors, in the thread that asked for it."""
    # A copy, since its tensors are replaced, and that must not show in other threads. They register and remove hooks of
    # their own meanwhile: deepcopy takes what the memo has for those tables, and does not walk through them.
    hooks = module._forward_hooks, module._forward_hooks_with_kwargs
    template = copy.deepcopy(module, {id(table): type(table)() for table in hooks} | without_copies(module))

    def run_row(tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: x[None], (args, kwargs))
        return tree_map_only(Tensor, lambda y: y[0], torch.func.functional_call(template, tensors, args, kwargs))

    def hook(_: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        if get_ident() != thread:  # a thread that runs while this hook comes or goes may leave out the keywords
            return kwargs_and_output[-1]
        kwargs = kwargs_and_output[0]
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                check_rows(x, index)
        own = {key: tensor[index.to(tensor.device)] for key, tensor in stacked.items()}
        batched = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, (own, args, kwargs))
        try:
            return torch.func.vmap(run_row, in_dims=batched)(own, args, kwargs)
        except (StateError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # recurrent layers, a branch that depends on values
            raise StateError(
                f"{path} ({type(module).__name__}) can't run with weights of its own for each row, as torch says "
                f"({str(error).partition('. ')[0]}); run the rows of each adapter by themselves"
            ) from error

    return hook
