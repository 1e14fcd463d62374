"""Updates of fused experts without a model: where a checkpoint holds what each is for.

transformers 5 holds the experts of a layer in two parameters, and most checkpoints hold them one by one. There the update of
one parameter is many, each plain LoRA on a matrix of its own:

    model.layers.0.mlp.experts.gate_up_proj                      in memory, (E, 2 d_expert, d_model)
    model.layers.0.mlp.experts.0.gate_proj.weight  ...           in Qwen's and DeepSeek's files, (d_expert, d_model)
    model.layers.0.block_sparse_moe.experts.0.w1.weight  ...     in Mixtral's, whose router has another name there too
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import StateError, WrongBaseError
from ..files.checkpoint import Checkpoint
from ..files.fingerprint import describe_parts
from .basis import check_line
from .layer_update import LayerUpdate
from .updates import AdapterUpdates

#: {parameter: the ways to hold it one by one: (what its module is called there, the matrices, one above the other)}.
SPLIT = {
    "gate_up_proj": (("mlp", ("gate_proj", "up_proj")), ("block_sparse_moe", ("w1", "w3"))),
    "down_proj": (("mlp", ("down_proj",)), ("block_sparse_moe", ("w2",))),
}


def onto(base: Checkpoint, adapter: AdapterUpdates) -> AdapterUpdates:
    """The adapter with its updates of parameters on the tensors that a checkpoint has for them.

    Raises:
        WrongBaseError: it has other experts, or was not the base.
    """
    layers: dict[str, LayerUpdate] = {}
    split = dict(adapter.split)
    for path, update in adapter.layers.items():
        names = _names(base, path) if update.is_parameter else []
        if not names:
            square = update.is_parameter and update.is_square
            layers[path] = replace(update, transposed=_lies_transposed(base, adapter, path)) if square else update
            continue
        parts = [base.tensors[name] for _, name in names if name in base.tensors]
        A, B = (t if t.dim() == 3 else t[None] for t in update.factors())  # E r d_in, E d_out r
        rows = [part.shape[0] for part in parts if len(part.shape) == 2]
        if len(rows) != len(names) or sum(rows) != B[..., 0].numel():
            raise WrongBaseError(
                f"{base.directory} has {sum(rows)} rows of experts in the place of {path}, whose update is for "
                f"{B[..., 0].numel()}; use the base it was trained on"
            )
        if adapter.fingerprint is not None and path not in adapter.packed_experts:
            shape = (update.matrices, B.shape[1], A.shape[2])[-2 if update.matrices == 1 else 0 :]
            read = [part.read for part in parts]
            check_line(adapter, path, describe_parts(read, shape, adapter.dtype_of(path) or parts[0].dtype))
        each, A, B = len(names) // update.matrices, A.unbind(), B.unbind()
        for i, (part, _) in enumerate(names):
            expert, done = divmod(i, each)
            own = B[expert][sum(rows[i - done : i]) :][: rows[i]]
            tensors = {"lora_A": A[expert], "lora_B": own}
            layers[part] = replace(update, path=part, tensors=tensors, is_parameter=False, matrices=1)
            split[part] = path
    return replace(adapter, layers=layers, split=split)


def first_layer(adapters: Sequence[AdapterUpdates]) -> str:
    """The path of an adapted layer; of a parameter, which is never packed as one, only if there is nothing else."""
    layers = {path: update.is_parameter or path in a.split for a in adapters for path, update in a.layers.items()}
    return min(layers, key=layers.get)


def _lies_transposed(base: Checkpoint, adapter: AdapterUpdates, path: str) -> bool:
    """Whether the square matrices at `path` are stored as (d_in, d_out): if the other parameters of the adapter are.

    Raises:
        StateError: it has none that are not square.
    """
    for other in adapter.layers.values():
        name = _find(base, other.path) if other.is_parameter and not other.is_square else None
        if name is not None:
            return other.is_transposed(base.tensors[name].shape[1:], False)
    raise StateError(
        f"the matrices of {path} are square, and which way they lie can't be told from the files; merge in memory: "
        "load_adapter, then merge_and_unload"
    )


def stored_experts(base: Checkpoint, path: str) -> tuple[int, list[str]]:
    """(how many experts, their tensors in the base one after the other) of a parameter; (0, []) if nothing is known of it."""
    if (whole := _find(base, path)) is not None:
        return base.tensors[whole].shape[0], [whole]
    names = [name for _, name in _names(base, path)]
    if not names or any(name not in base.tensors for name in names):
        return 0, []
    return len(names) // len({name.rpartition(".experts.")[2].partition(".")[2] for name in names}), names


def _names(base: Checkpoint, path: str) -> list[tuple[str, str]]:
    """(path of a matrix, as the adapter would call it; its tensor in the base) of those that the base holds in the place of a
    parameter, expert by expert; none if it holds that itself, or nothing that is known."""
    outer, _, name = path.rpartition(".")
    above, _, last = outer.rpartition(".")
    parent, dot, _ = above.rpartition(".")
    if _find(base, path) is not None:
        return []
    renamed = path.replace(".mlp.", ".block_sparse_moe.")
    if (single := _find(base, renamed)) is not None and renamed.endswith(".weight"):
        return [(renamed.removesuffix(".weight"), single)]
    for module, parts in SPLIT.get(name, ()):
        where = f"{parent}{dot}{module}.{last}"
        if (first := _find(base, f"{where}.0.{parts[0]}.weight")) is None:
            continue
        root = first.removesuffix(f"0.{parts[0]}.weight")
        found = []
        while f"{root}{len(found) // len(parts)}.{parts[0]}.weight" in base.tensors:
            e = len(found) // len(parts)
            found += [(f"{where}.{e}.{part}", f"{root}{e}.{part}.weight") for part in parts]
        return found
    return []


def _find(base: Checkpoint, name: str) -> str | None:
    """The base's tensor of this name, which may have a prefix more or less."""
    if name in base.tensors:
        return name
    return next((other for other in base.tensors if other.endswith(f".{name}") or name.endswith(f".{other}")), None)
