"""`LoraConfig`: what an adapter is, checked when it is made.

    LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])

The field names are those of PEFT's `adapter_config.json`, so that a configuration can travel. The update that an
adapter adds to a weight W is (Hu et al., "LoRA", arXiv 2106.09685, section 4.1)

    W + scaling * B A        scaling = lora_alpha / r        or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import ConfigError
from .checks import check_alpha, check_choice, check_rank, check_regex, frozen_ranges, is_number
from .patterns import END, LAYERS, WHOLE, matches
from .peft_fields import TakesFieldsOfPeft
from .starts import INITIALIZERS, starts_from_weight, starts_later, subtracts_start
from .tokens import INVOCATION, frozen_invocation, frozen_tokens

BIAS_MODES = ("none", "all", "lora_only")
ALL_LINEAR = "all-linear"
TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

#: The heads that a task adds to a pretrained model: new, so trained and saved whole (PEFT's lists, by task).
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class LoraConfig(metaclass=TakesFieldsOfPeft):
    """The settings of one adapter. Immutable; every value is checked when the object is made.

    What else PEFT's `LoraConfig` takes is taken too, where it says nothing of the maths: see `spec/peft_fields.py`.

    Args:
        r: rank of the update, a positive integer.
        lora_alpha: numerator of the scaling, a positive number.
        lora_dropout: probability, in [0, 1), with which an element of the adapter's input is zeroed in training. Each layer
            draws its own mask, as in the paper and in PEFT; `share_dropout_masks` makes siblings share one.
        target_modules: which layers to adapt. A list of names: each matches the module of exactly that path or any
            path that ends in `.name`. A string: a regular expression that must match the whole path. `"all-linear"`:
            every linear layer but the head. None: what `spec/architectures.py` names for the model's architecture.
            Empty, with target_parameters: none.
        target_parameters: parameters to adapt that no layer has as its weight, such as fused experts: a list of names, each of
            a parameter of exactly that path or of any that ends in `.name` ("experts.gate_up_proj"). Needs lora_dropout=0.
        exclude_modules: the same patterns as target_modules; what they match is left alone.
        bias: which biases of the base are trained too: `"none"`, `"all"`, or `"lora_only"` (those of adapted layers).
        modules_to_save: modules trained and saved whole. A module is meant when its path ends with an entry, as bare
            text, which is PEFT's rule: "classifier" means DistilBERT's "pre_classifier" as well.
        use_rslora: scale by lora_alpha / sqrt(r).
        use_dora: train the magnitude of each row of the weight apart from its direction (DoRA, arXiv 2402.09353).
        lora_bias: give B a bias, trained from zero; adapted layers need one of their own to be merged.
        init_lora_weights: where A and B start. True: A Kaiming-uniform and B zero; False: B random too, so that the
            adapter changes the model from the start (of use in tests); or "gaussian", "orthogonal", "pissa",
            "pissa_niter_N", "olora" (see `methods/start.py`). "eva", "loftq", "corda" and "lora_ga" need more than the
            model, and `inject` says which verb starts an adapter so.
        rank_pattern: {pattern: value}, an r of its own for some layers. A pattern matches a path that it ends, after a dot or
            from the start, as a regular expression; the first hit wins.
        alpha_pattern: the same for lora_alpha.
        layers_to_transform: adapt only the layers of these indices, an integer or a list (target list only).
        layers_pattern: name of the module list that holds those layers, when it can't be told from the path.
        layer_replication: pairs [start, end): the model's layers are stacked anew by these ranges, and those that come again
            share their weights, and have adapters of their own. See `model/replicate.py`.
        trainable_token_indices: tokens whose rows of the embeddings are trained, and no others: a list of them for the input
            embeddings, or {name of a module: its list}. A head that is tied to these embeddings goes with them.
        alora_invocation_tokens: activated LoRA: the tokens from which on the adapter acts, wherever they stand last in a text;
            what stands before is the base's, and so is its cache. See `methods/activated.py`.
        task_type: one of TASK_TYPES; a classification type adds the model's head to `modules_to_save`.
        ensure_weight_tying: train one copy for all the paths of a tied tensor in `modules_to_save` (a head that is the input
            embeddings); else each that is named is trained apart, and the others keep the base's.
        base_model_name_or_path: which base the adapter belongs to; written to its file, not used here.
        inference_mode: whether `inject` adds the adapter without training it, as a file's is by `load_adapter`.

    Raises:
        ConfigError: a field is unknown or its value is not allowed; the message names field, value and what is.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    layer_replication: Sequence[Sequence[int]] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    alora_invocation_tokens: Sequence[int] | None = None
    task_type: str | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None
    inference_mode: bool = False

    #: What `peft_type` says of such an adapter, in PEFT's objects and files.
    peft_type: ClassVar[str] = "LORA"

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be a probability in [0, 1), not {self.lora_dropout!r}")
        check_choice("bias", self.bias, BIAS_MODES)
        if self.task_type is not None:
            check_choice("task_type", self.task_type, TASK_TYPES)
        for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._check_start()
        if self.lora_bias and (self.use_dora or self.bias != "none"):
            raise ConfigError("lora_bias=True goes with neither use_dora nor a bias mode: both would train the same bias")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            form = LAYERS if name == "layers_pattern" else WHOLE
            if isinstance(value, str):
                check_regex(name, value, form)
                continue
            self._freeze_names(name, value)
            for entry in (value or ()) if form == LAYERS else ():
                check_regex(name, entry, form)
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} must be a list of names, not the string {value!r}")
            self._freeze_names(name, value)
        self._freeze_pattern("rank_pattern", check_rank)
        self._freeze_pattern("alpha_pattern", check_alpha)
        base = self.base_model_name_or_path
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"base_model_name_or_path must be a name or a path, not {base!r}")
        object.__setattr__(self, "_found", {})  # {(field, path): what its patterns say}
        self._freeze_layer_indices()
        object.__setattr__(self, "trainable_token_indices", frozen_tokens(self.trainable_token_indices))
        object.__setattr__(self, "layer_replication", frozen_ranges("layer_replication", self.layer_replication))
        object.__setattr__(self, INVOCATION, frozen_invocation(self.alora_invocation_tokens))
        if self.alora_invocation_tokens and (self.use_dora or self.lora_bias):
            raise ConfigError(f"{INVOCATION} goes with neither use_dora nor lora_bias; leave them out")

    def _check_start(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, bool) or init in INITIALIZERS or starts_from_weight(init) or starts_later(init):
            return
        known = ", ".join(map(repr, INITIALIZERS))
        raise ConfigError(f"init_lora_weights must be True, False, {known} or 'pissa_niter_N', not {init!r}")

    def _freeze_names(self, name: str, value: Any) -> None:
        if value is None:
            return
        valid = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) and v for v in value)
        if not valid:
            raise ConfigError(f"{name} must be a list of module names, not {value!r}")
        if not value and not (name == "target_modules" and self.target_parameters):
            raise ConfigError(f"{name} is an empty list; leave it None or name a module")
        ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
        object.__setattr__(self, name, tuple(ordered))

    def _freeze_pattern(self, name: str, check: Any) -> None:
        pattern = getattr(self, name)
        if not isinstance(pattern, Mapping):
            raise ConfigError(f"{name} must be a dictionary of pattern to value, not {pattern!r}")
        for key, value in pattern.items():
            check_regex(name, key, END)
            check(f"{name}[{key!r}]", value)
        object.__setattr__(self, name, dict(pattern))

    def _freeze_layer_indices(self) -> None:
        indices = self.layers_to_transform
        if indices is None and self.layers_pattern is not None:
            raise ConfigError("layers_pattern is set without layers_to_transform; say which layers, or leave it out")
        if indices is None:
            return
        listed = [indices] if isinstance(indices, int) else indices
        valid = isinstance(listed, (list, tuple)) and listed and all(type(i) is int and i >= 0 for i in listed)
        if not valid:
            raise ConfigError(f"layers_to_transform must be a layer index or a list of them, not {indices!r}")
        if isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform needs target_modules as a list, not the pattern {self.target_modules!r}; "
                "put the layer numbers into the pattern"
            )
        object.__setattr__(self, "layers_to_transform", tuple(listed))

    @property
    def saved_module_patterns(self) -> tuple[str, ...]:
        """`modules_to_save` and the heads that `task_type` adds, without repeats, in order."""
        return tuple(dict.fromkeys((*(self.modules_to_save or ()), *TASK_HEADS.get(self.task_type or "", ()))))

    def as_stored(self) -> LoraConfig:
        """What this adapter is in a file: one that subtracts its start is plain LoRA of rank 2r with the same scaling."""
        if not subtracts_start(self.init_lora_weights):
            return self
        alpha = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            self,
            init_lora_weights=True,
            r=2 * self.r,
            lora_alpha=alpha * self.lora_alpha,
            rank_pattern={key: 2 * value for key, value in self.rank_pattern.items()},
            alpha_pattern={key: alpha * value for key, value in self.alpha_pattern.items()},
        )

    def scaled_by(self, factor: float) -> LoraConfig:
        """The same adapter with all of its updates times `factor`, in `lora_alpha`.

        Raises:
            ConfigError: no `lora_alpha` says that.
        """
        if factor <= 0:
            raise ConfigError(f"an adapter scaled by {factor:g} can't be stored: lora_alpha is positive; scale it by 1 first")
        alphas = {key: factor * value for key, value in self.alpha_pattern.items()}
        return dataclasses.replace(self, lora_alpha=factor * self.lora_alpha, alpha_pattern=alphas)

    def rank_for(self, path: str) -> int:
        """The rank of the layer at `path`, after `rank_pattern`."""
        return self._first_match("rank_pattern", path, self.r)

    def scaling_for(self, path: str) -> float:
        """The factor before B A for the layer at `path`, after both patterns."""
        r, alpha = self.rank_for(path), self.alpha_for(path)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def alpha_for(self, path: str) -> float:
        """The numerator of that factor, after `alpha_pattern`."""
        return self._first_match("alpha_pattern", path, self.lora_alpha)

    def _first_match(self, name: str, path: str, default: Any) -> Any:
        found: dict[tuple[str, str], Any] = self._found  # type: ignore[attr-defined]  # no field
        if (name, path) not in found:  # asked for often, and there may be a pattern for each layer
            hits = (value for pattern, value in getattr(self, name).items() if matches(pattern, path, END))
            found[name, path] = next(hits, default)
        return found[name, path]
