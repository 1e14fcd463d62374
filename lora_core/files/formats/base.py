"""`AdapterFormat`: another tool's adapter files, read and written. The contract, and what every format shares.

A format says of a `Source` (see `source.py`) whether it is its own, by what is in it and not by its name. It reads it into
`Contents`: for each layer the tensors that PEFT's files would have, and the alpha that they are scaled with,

    W + (alpha / r) B A        A: (r, d_in);  B: (d_out, r);  of a convolution the kernels that PEFT's files have

Layers keep the tool's own names, and their rows the tool's own order, until `to_base` makes of both what the base has. So a
file can be looked at without a base. What the file does not say comes from the `Base`: the base's configuration, the shapes of
its weights, and what the user said (`hints`).

A format of one's own: derive from `AdapterFormat`, give `recognises`, `read` and `write`, and register it:

    register_format(Mine())
    load_adapter(model, "adapter.mine");  python -m lora_core convert adapter/ --to mine --output out/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ConfigError, FileFormatError
from ...spec.checks import check_alpha
from .source import Source

#: What a user may say of a file that does not say it itself.
HINTS = ("lora_alpha", "component", "enable_lora")


@dataclass(frozen=True)
class Layer:
    """What an adapter has for one layer.

    Attributes:
        tensors: {table of the method: tensor}, shaped as in PEFT's files: "lora_A", "lora_B", MAGNITUDE.
        alpha: the numerator of the scaling alpha / r; None: the file does not say.
        embedding: whether the layer is an embedding.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.tensors["lora_A"].shape[0]

    def mapped(self, table: str, change: Callable[[Tensor], Tensor]) -> Layer:
        """The same with one tensor changed, if it is there."""
        tensors = dict(self.tensors)
        if table in tensors:
            tensors[table] = change(tensors[table])
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        layers: {path: what there is for that layer}.
        fields: what it says besides, as fields of a `LoraConfig`: `base_model_name_or_path`, `task_type`.
        biases: {path of a bias of the base: the adapter's own}, of adapted layers.
        others: what it holds besides this, in words, such as "text_encoder (12 layers)".
        transposed: whether it says that the base's linear weights are stored as (d_in, d_out), as GPT-2's are.
    """

    layers: Mapping[str, Layer]
    fields: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Base:
    """What is known of the base that an adapter is for.

    Attributes:
        config: what its config.json says; empty if it is not known.
        shapes: {path of a layer: shape of its weight}; empty if they are not known.
        embeddings: paths of those that are embeddings.
        hints: what the user said of the file: some of HINTS.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    hints: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.hints:
            if name not in HINTS:
                raise ConfigError(f"hints has no entry {name!r}; it may have {', '.join(HINTS)}")
        if "lora_alpha" in self.hints:
            check_alpha("lora_alpha", self.hints["lora_alpha"])

    @cached_property
    def by_underscores(self) -> Mapping[str, str | None]:
        """{path with underscores in the place of its dots: the path}; None for what stands for two."""
        found: dict[str, str | None] = {}
        for path in self.shapes:
            name = path.replace(".", "_")
            found[name] = None if name in found else path
        return found

    @property
    def model_type(self) -> str:
        """Of the configuration; "" if that is not known."""
        return str(self.config.get("model_type") or "")

    def heads(self, what: str) -> tuple[int, int, int]:
        """(query heads, key heads, width of a head). Raises a FileFormatError if the base is not known; `what` needs them."""
        names = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
        n, n_kv, width, d = (self.config.get(name) for name in names)
        if not _is_size(n) or not (_is_size(width) or _is_size(d)):
            raise FileFormatError(
                f"{what} orders the rows of q and k by heads, and the base's configuration is not known; name the base "
                "(--base), or load it onto a model of transformers"
            )
        return n, n_kv if _is_size(n_kv) else n, width if _is_size(width) else d // n


class AdapterFormat:
    """One tool's files. A subclass gives the attributes, `recognises` and `read`, and `write` if it can be written.

    Attributes:
        name: a word that no other format has; `convert --to` takes it.
        tool: what messages call the tool.
        files: names of the file in a directory that is looked at first.
        holds: tables that it has a place for, and "biases" if it has one for those of adapted layers.
    """

    name = tool = ""
    files: tuple[str, ...] = ()
    holds: tuple[str, ...] = ("lora_A", "lora_B")

    def recognises(self, source: Source) -> bool:
        """Whether the file is this tool's, by what is in it."""
        raise NotImplementedError

    def read(self, source: Source, base: Base) -> Contents:
        """What the file holds, by the tool's own names of layers; of the base nothing may be known.

        Raises:
            FileFormatError: it is broken, or holds what has no place in an adapter; says what.
        """
        raise NotImplementedError

    def to_base(self, contents: Contents, base: Base) -> Contents:
        """The same with the base's paths and order of rows. Raises a FileFormatError that lists what can't be mapped."""
        return contents

    def from_base(self, contents: Contents, base: Base) -> Contents:
        """The reverse of `to_base`."""
        return contents

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        """Writes the files into a directory, which is there whole or not at all when this returns or raises."""
        raise ConfigError(f"{self.tool} files can be read, and not written")


#: {name: format}, those that are registered, asked in this order; `registry.py` fills it.
FORMATS: dict[str, AdapterFormat] = {}


def register_format(form: AdapterFormat) -> None:
    """Makes `load_adapter` and the command line know a file format of one's own; see `files/formats/base.py`.

    Args:
        form: the format. It is asked whether a file is its own before those that are there already.

    Raises:
        ConfigError: it is no AdapterFormat, or its name is no word or another format's already.
    """
    if not isinstance(form, AdapterFormat) or not re.fullmatch(r"\w+", form.name):
        raise ConfigError(f"register_format takes a lora_core.AdapterFormat with a name, not {form!r}; derive from that")
    if form.name in FORMATS or form.name == "peft":
        raise ConfigError(f"there is a format {form.name!r} already; give yours another name")
    others = dict(FORMATS)
    FORMATS.clear()
    FORMATS.update({form.name: form}, **others)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
