"""Merging over a checkpoint's files: shard by shard, tensor by tensor, without building the model.

    report = merge_checkpoint("llama/", ["adapter/"], "merged/", Recipe(dtype=torch.bfloat16))

Each adapted weight is read, folded in float32 by the same code that folds a layer of a model, cast once and written; every
other tensor is copied, or cast. So the memory that it takes is that of the largest layer, whatever the model's size (with
a packed result that of the largest shard in packed form besides), and the time about that of copying the files.

What the adapter is folded into, `base_as`:

    "original"           the base's weights as they are in the files
    "NAME-dequantized"   those weights packed as the base NAME does and unpacked again: exactly what QLoRA trained against
    "NAME"               what the adapter was trained against; the result is packed, which loses a part of the update
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bases import base_for, base_of, dense_weight
from ..bases.base import Format
from ..errors import FileFormatError, StateError
from ..files.adapter import FLOAT_DTYPES
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.shards import Entry, new_directory, write_index, write_shard
from ..files.stored import StoredTensor
from ..integrations.model_class import ModelClass, known_class
from ..layers import LoraLayer
from ..maths.loss import Cost, cast, cost, cost_of_cast, refuse_loss
from ..model.merge import MergeReport
from ..progress import counted
from ..spec.targets import is_head
from .basis import Basis, check_base, find_basis
from .companions import Result, companions_of_merge, write_companions
from .experts import as_trained
from .layer_update import LayerUpdate, carrier
from .moved import follow, moved_names
from .packing import layers_to_pack, matrices, refuse_renamed
from .parameters import first_layer, onto
from .recipe import AS_IT_IS, DEQUANTIZED, ORIGINAL, REMEDY, Recipe, packing_of
from .updates import AdapterUpdates, read_updates
from .vocabulary import extended, place_grown, rows_of


def merge_checkpoint(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    recipe: Recipe = AS_IT_IS,
    progress: Callable[[int], object] | None = None,
) -> MergeReport:
    """Merges adapter directories into a base's files; `output` is there whole or not at all, and loads in transformers.

    Args:
        base: directory of the base: config.json, safetensors weights in one file or in shards, its tokenizer.
        adapters: directory of an adapter, or of several, whose updates add up.
        output: the directory to make.
        recipe: how.
        progress: hears of the bytes of each tensor that was written; None: a bar on a terminal.

    Returns:
        What it cost: for each layer, what casting or packing lost of the update.

    Raises:
        LoraError: the files are broken or don't belong together, a merged weight is not finite in its dtype, or the result
            can't be written. Nothing is at `output`.
    """
    several = [adapters] if isinstance(adapters, (str, Path)) else adapters
    merge = StreamMerge(open_checkpoint(Path(base)), [read_updates(Path(a)) for a in several], recipe)
    with new_directory(Path(output)) as directory, counted(merge.nbytes, "merging") as bar:
        return merge.write(directory, progress or bar)


class StreamMerge:
    """One merge; when it is made, all has been checked that can be without reading every weight.

    Attributes:
        base, original: the base as the adapters know its experts, and as its files are.
        base_as: as the recipe has it, given or chosen.
        form: what the base's weights are packed in first; None: they are not.
        quantized, repacks: paths of the layers that are packed, and whether they are in the result too.
        file_dtype, result_dtype: of the adapted weights, in the base's files and in the result.
        nbytes: bytes of the tensors to be written, for a progress bar: about, if they are packed.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[AdapterUpdates], recipe: Recipe = AS_IT_IS) -> None:
        if "quantization_config" in base.config:
            raise FileFormatError(f"{base.directory} is quantised already; give the base that it was made from")
        weights = recipe.weights_for([(adapter.directory, adapter.config) for adapter in adapters])
        self.base, self.original, self.recipe = base, base, recipe
        self.placement, adapters = place_grown(base, [onto(base, follow(base, adapter)) for adapter in adapters])
        companions_of_merge(base, adapters)  # so that an error of theirs comes now
        self.adapters, self.rows = adapters, rows_of(self.placement, adapters)
        self.copies = {name: tensor for adapter in adapters for name, tensor in adapter.copies.items()}
        self.updates: dict[str, dict[str, tuple[LayerUpdate, float]]] = {}  # {path: {adapter: (update, weight)}}
        for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
            for path, update in adapter.layers.items():
                self.updates.setdefault(path, {})[f"adapter{i}"] = (update, weight)
        self.weights = {path: f"{path}.weight" for path in self.rows}  # {path: name of the tensor that changes}
        self.weights |= {path: next(iter(held.values()))[0].weight for path, held in self.updates.items()}
        self.paths = {name: path for path, name in self.weights.items()}
        self.transposed = any(adapter.transposed for adapter in adapters)
        self.spent: dict[str, Cost] = {}
        self.basis = find_basis(adapters, first := first_layer(adapters), self._read(first))
        trained = f"{base_for(self.basis.form).name}{DEQUANTIZED}" if self.basis.trained_on_packed else ORIGINAL
        self.base_as = recipe.base_as or trained
        self.experts = as_trained(base, adapters, self.basis.loaded)
        self.basis = replace(self.basis, loaded=self.experts.loaded)
        self.base = base if self.base_as == ORIGINAL else self.experts.base
        packing, self.repacks = packing_of(self.base_as)
        own = self.basis.form
        self.form: Format | None = packing and (own if isinstance(own, packing.Format) else packing.Format())
        self.quantized = frozenset(self.packed_layers() if packing else ())
        if self.repacks:
            refuse_renamed(self.quantized, self.known)
        self.file_dtype = base.tensors[self._source(first)].dtype
        self.result_dtype = recipe.dtype or self.file_dtype
        self.nbytes = sum(base.tensors[source].nbytes for source in self.placement.names.values())

    def write(self, directory: Path, progress: Callable[[int], object] = int) -> MergeReport:
        """Writes the merged checkpoint into an empty directory."""
        places, size = {}, 0
        for shard in self.base.shards:
            names = [n for n, source in self.placement.names.items() if self.base.tensors[source].file.name == shard]
            names += self.placement.added if shard == self.base.shards[-1] else ()
            entries = {key: entry for name in names for key, entry in self._entries(name).items()}
            if entries:
                # The largest elements first: every tensor is then aligned in the file.
                entries = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
                write_shard(directory / shard, entries, progress)
                places |= dict.fromkeys(entries, shard)
                size += sum(entry.nbytes for entry in entries.values())
        if len(self.base.shards) > 1:
            write_index(directory, places, size)
        packed = tuple(sorted(self.quantized)) if self.repacks else ()
        kept = {path: c.kept for path, c in self.spent.items()}
        if not self.recipe.allow_loss:
            refuse_loss(kept, REMEDY)
        report = MergeReport(
            adapters=tuple(str(adapter.directory.name) for adapter in self.adapters),
            layers={path: c.lost for path, c in self.spent.items() if path in self.updates or path in self.rows},
            dequantized=(*sorted(self.quantized - set(packed)), *(self.experts.paths if self.base_as != ORIGINAL else ())),
            requantized=packed,
            kept=kept,
            moved=moved_names(self.adapters),
        )
        own = {name.removesuffix(".weight") for name, tensor in self.copies.items() if tensor.dim() == 2}
        # Also what the file does not hold, since it is tied: transformers would make a 4-bit layer of it.
        tied = {name.removesuffix(".weight") for group in (self.known.tied if packed and self.known else ()) for name in group}
        dense = tuple(sorted((self._matrices() | own | tied) - self.quantized))
        form = self.form if packed else None
        result = Result(self.placement.config, self.result_dtype, self.base_as, form, dense, report)
        write_companions(directory, self.base, self.adapters, result)
        return report

    # --- what is written in the place of each tensor ------------------------------------------------------------------

    def _entries(self, name: str) -> dict[str, Entry]:
        """What stands in the merged checkpoint for one name: itself, or the parts of a 4-bit weight."""
        source = self.base.tensors.get(self.placement.names.get(name, ""))
        own, path = self.copies.get(name), self.paths.get(name, name.removesuffix(".weight"))
        dtype = self._result_dtype((source or own).dtype)
        if path in self.rows or (own is not None and path in self.updates):
            return {name: Entry(dtype, tuple(self._read(path).shape), lambda: self._folded(path, source, dtype))}
        if own is not None:
            if source is not None and source.shape != own.shape and not is_head(name) and len(own) != self.placement.vocabulary:
                raise FileFormatError(
                    f"the adapter's {name} is {tuple(own.shape)}, and the base's {source.shape}; use the base it was trained on"
                )
            return {name: Entry(dtype, tuple(own.shape), lambda: self._trained(name, own, dtype))}
        if self._added_biases(path):
            return {name: Entry(dtype, source.shape, lambda: self._with_biases(path, source, dtype))}
        if path in self.quantized and self.repacks:
            layer = self._packed(path, source)
            parts = base_of(layer).state(layer)
            return {f"{path}.{part}": Entry(t.dtype, tuple(t.shape), partial(Tensor.cpu, t)) for part, t in parts.items()}
        if path in self.updates:
            return {name: Entry(dtype, source.shape, lambda: self._folded(path, source, dtype))}
        if path in self.quantized:
            return {name: Entry(dtype, source.shape, lambda: cast(dense_weight(self._pack(source.read())), dtype, name))}
        if dtype != source.dtype:
            return {name: Entry(dtype, source.shape, lambda: cast(source.read(), dtype, name))}
        return {name: Entry(dtype, source.shape, source)}

    def _result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.recipe.dtype if self.recipe.dtype and dtype in FLOAT_DTYPES else dtype

    def _trained(self, name: str, own: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor that an adapter has trained whole."""
        result = cast(own, dtype, name)
        source = self.base.tensors.get((self.placement.names | self.placement.aliases).get(name, ""))
        if dtype != own.dtype and own.is_floating_point() and source is not None and source.shape == own.shape:
            self.spent[name] = cost_of_cast(own, source.read(), result)
        return result

    def _folded(self, path: str, source: StoredTensor, dtype: torch.dtype) -> Tensor:
        """The merged weight, laid out as in the file."""
        layer, names = self._adapted(path, source, self.form if path in self.quantized else None)
        try:
            self.spent[path] = layer.fold(names, dtype)
        except StateError as error:
            raise StateError(f"{path}: {error}; nothing was merged") from None
        return layer.weight.data.t() if self._is_transposed(path, source) else layer.weight.data

    def _packed(self, path: str, source: StoredTensor) -> nn.Module:
        """A layer with the packed weight, merged if it is adapted.

        The update is added to the weight of the file, and not to what that becomes when it is packed, which would snap back.
        """
        W = source.read()
        if path not in self.updates:
            return self._pack(W)
        layer, names = self._adapted(path, source, self.basis.form if self.basis.trained_on_packed else None)
        try:
            exact, trained_on = layer.folded_weight(names), layer.dense_weight()
        except StateError as error:
            raise StateError(f"{path}: {error}; nothing was merged") from None
        dtype, repack = self._result_dtype(source.dtype), Basis(self.form).pack  # of merged weights, in their own dtype
        packed = repack((W.to(exact.dtype) + (exact - trained_on)).to(dtype))
        before = dense_weight(repack(W.to(dtype)))
        self.spent[path] = cost(exact, trained_on, dense_weight(packed), before)
        return packed

    def _pack(self, W: Tensor) -> nn.Module:
        """A layer with a weight of the base, packed."""
        return replace(self.basis, form=self.form).pack(W)

    def _adapted(self, path: str, source: StoredTensor, form: Format | None) -> tuple[LoraLayer, list[str]]:
        """The layer with its adapters on it, packed in `form` if there is one, and their names."""
        W = self._read(path)
        check_base(self.basis, self.adapters, path, W)
        updates, rows = self.updates.get(path, {}), self.rows.get(path, {})
        if form:
            base = replace(self.basis, form=form).pack(W)
        elif updates:
            base = next(iter(updates.values()))[0].plain_layer(W, self.transposed)
        else:
            base = nn.Embedding(*W.shape, _weight=W)
        layer = carrier(base)
        for name, (update, weight) in updates.items():
            update.put_on(layer, name, weight)
        for name, own in rows.items():
            own.put_on(layer, name)
        return layer, [*updates, *rows]

    def _with_biases(self, path: str, source: StoredTensor, dtype: torch.dtype) -> Tensor:
        own = self._added_biases(path)
        return cast(source.read().to(own[0].dtype) + sum(own), dtype, path)

    def _added_biases(self, path: str) -> list[Tensor]:
        """What adapters with a bias of their own add to the bias at `path`."""
        updates = self.updates.get(path.removesuffix(".bias"), {}) if path.endswith(".bias") else {}
        return [bias * w for u, w in updates.values() if (bias := u.bias()) is not None]

    # --- the base's weights -------------------------------------------------------------------------------------------

    def _source(self, path: str) -> str:
        return self.placement.names[self.weights[path]]

    def _read(self, path: str) -> Tensor:
        own, rows = self.copies.get(self.weights[path]), self.rows.get(path, {})
        if own is not None:
            return extended(own, rows)
        source = self.base.tensors[self._source(path)]
        if source.dtype not in FLOAT_DTYPES:
            raise FileFormatError(f"{source.file}: {path} is {source.dtype}; adapters are folded into float weights")
        return extended(source.read(), rows)

    def _is_transposed(self, path: str, source: StoredTensor) -> bool:
        if path not in self.updates:
            return False
        update, _ = next(iter(self.updates[path].values()))
        return not update.embedding and len(source.shape) == 2 and update.is_transposed(source.shape, self.transposed)

    def _matrices(self) -> set[str]:
        """Paths of what may be a linear layer."""
        return matrices(self.base, self.placement, {*self.copies, *self.experts.names})

    def trained_form(self) -> tuple[Basis, tuple[str, ...], torch.dtype]:
        """The form of 4-bit weights that the adapters were trained on, which layers had them, and the dtype of the others."""
        layers = (*sorted(self.packed_layers()), *self.experts.paths) if self.basis.trained_on_packed else ()
        return self.basis, layers, self.basis.loaded or self.adapters[0].dense_dtype or self.file_dtype

    @cached_property
    def known(self) -> ModelClass | None:
        """What transformers knows of the class of the result."""
        return known_class(self.base.directory, self.placement.architecture)

    def packed_layers(self) -> set[str]:
        """Paths of the layers that are packed."""
        if self.transposed:
            raise StateError("layers that store their weight transposed (GPT-2's) have no packed form; use --base-as original")
        return layers_to_pack(self._matrices(), self.recipe.quantized, self.adapters, self.known)
