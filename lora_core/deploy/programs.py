"""What another program would refuse of an adapter, or read as another one, and the command that mends it.

    for finding in findings("adapter/", "vllm", max_lora_rank=16):
        print(finding)

Sources: vLLM's vllm/lora/peft_helper.py and utils.py; llama.cpp's src/llama-adapter.cpp; PEFT 0.21's adapter types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..files.formats.gguf import Gguf
from ..files.formats.registry import is_peft
from ..methods.registry import method_of
from .foreign import read_as_it_is
from .updates import AdapterUpdates, read_updates

#: What `vllm serve --max-lora-rank` may be, and is if it is not given.
VLLM_RANKS, VLLM_RANK = (8, 16, 32, 64, 128, 256, 320, 512), 16
#: The kinds of adapter among ours that PEFT knows too.
PEFT_TYPES = ("LORA", "VERA")


@dataclass(frozen=True)
class Finding:
    """What a program does with a part of an adapter, and the command that mends it."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}; {self.mend}"


@dataclass(frozen=True)
class _Asked:
    path: Path
    tool: str | None  # None: PEFT's
    updates: AdapterUpdates
    max_lora_rank: int

    def convert(self, options: str) -> str:
        return f"python -m lora_core convert {self.path} {options} --output NEW"

    @property
    def merge(self) -> str:
        return f"python -m lora_core merge --adapter {self.path} --base BASE --output NEW"


def findings(path: str | Path, program: str, *, max_lora_rank: int = VLLM_RANK) -> tuple[Finding, ...]:
    """What `program` refuses of an adapter; nothing if it takes it.

    Args:
        path: a directory with PEFT's files, or another tool's file.
        program: "vllm", "llama.cpp" or "peft".
        max_lora_rank: what `vllm serve --max-lora-rank` is given.

    Raises:
        ConfigError: there is no such program here.
        FileFormatError: the adapter is broken.
    """
    if program not in PROGRAMS:
        raise ConfigError(f"what {program!r} refuses is not known here; known are {', '.join(PROGRAMS)}")
    path = Path(path)
    foreign = None if is_peft(path) else read_as_it_is(path)
    tool, updates = (None, read_updates(path, finite=False)) if foreign is None else (foreign.tool, foreign.updates)
    return tuple(PROGRAMS[program](_Asked(path, tool, updates, max_lora_rank)))


def _vllm(asked: _Asked) -> list[Finding]:
    found = _foreign(asked) + _method(asked) + _whole(asked)
    ranks = {update.rank for update in asked.updates.layers.values()}
    if max(ranks) > asked.max_lora_rank:
        enough = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)
        mend = f"vllm serve BASE --enable-lora --max-lora-rank {enough}" if enough else asked.merge
        found.append(Finding(f"refuses rank {max(ranks)}, above --max-lora-rank {asked.max_lora_rank}", mend))
    config = asked.updates.config
    common = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    others = [p for p, u in asked.updates.layers.items() if abs(u.scaling - common) > 1e-12 * common]
    if others and asked.tool is None:
        what = f"scales all layers by lora_alpha / r = {common:g}, and {len(others)} have another scaling"
        found.append(Finding(f"{what} ({others[0]})", asked.convert("--to vllm")))
    return found


def _llama_cpp(asked: _Asked) -> list[Finding]:
    if method_of(asked.updates.config).unmergeable:
        return [Finding("refuses PEFT's files: it reads GGUF", "llama.cpp's convert_lora_to_gguf.py writes its invocation too")]
    found = _method(asked) + _whole(asked)
    convolutions = [p for p, u in asked.updates.layers.items() if any(t.dim() > 2 for t in u.tensors.values())]
    if convolutions:
        found.append(Finding(f"refuses adapters of convolutions ({convolutions[0]})", asked.merge))
    if asked.tool != Gguf.tool and not found:
        if asked.tool is None:
            found.append(Finding("refuses PEFT's files: it reads GGUF", asked.convert("--to gguf --base BASE")))
        else:
            found.append(Finding(f"refuses the format of {asked.tool}: it reads GGUF", asked.convert("--to gguf --base BASE")))
    return found


def _peft(asked: _Asked) -> list[Finding]:
    found = _foreign(asked)
    method = method_of(asked.updates.config)
    if method.peft_type not in PEFT_TYPES:
        found.append(Finding(f"refuses peft_type {method.peft_type!r}", asked.convert("--plain --base BASE")))
    return found


def _foreign(asked: _Asked) -> list[Finding]:
    if asked.tool is None:
        return []
    return [Finding(f"refuses the format of {asked.tool}: it reads PEFT's files", asked.convert("--to peft --base BASE"))]


def _method(asked: _Asked) -> list[Finding]:
    """What is not plain LoRA."""
    method = method_of(asked.updates.config)
    if method.bias_table is not None:
        return [Finding("refuses a bias of B (lora_bias)", asked.merge)]
    if method.unmergeable:
        return [Finding(f"reads {method.label} as plain LoRA, which acts on every token", "run it here, or with PEFT")]
    if not method.is_plain:
        first = "" if asked.tool is None else "of PEFT's files, made with --to peft: "
        return [Finding(f"refuses {method.label}", first + asked.convert("--plain --base BASE"))]
    return []


def _whole(asked: _Asked) -> list[Finding]:
    """What is trained whole, or some rows of it."""
    held, rows = sorted(asked.updates.copies), sorted(asked.updates.tokens)
    parts = {"what is trained whole": held, "what has rows that are trained for some tokens": rows}
    found = [Finding(f"refuses {what} ({', '.join(names[:3])})", asked.merge) for what, names in parts.items() if names]
    if asked.updates.config.layer_replication is not None:
        found.append(Finding("builds no model of replicated layers", "load it here, merge_and_unload, and serve the result"))
    return found


PROGRAMS: dict[str, Callable[[_Asked], list[Finding]]] = {"vllm": _vllm, "llama.cpp": _llama_cpp, "peft": _peft}
