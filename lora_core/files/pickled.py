"""Tensors that torch has pickled: `adapter_model.bin`, as PEFT wrote adapters before safetensors, and other tools' files.

A pickle can run code. `torch.load(weights_only=True)` builds tensors and plain containers, and refuses all else; what it
refuses stays refused. What it does not look at is looked at here first, since a file of a hundred bytes can keep it busy for
ever: archives that are compressed, and objects that hold one another twice over, which takes 2^n steps to hash.
"""

from __future__ import annotations

import io
import os
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..errors import FileFormatError
from .header import MAX_NAME
from .reading import open_file

#: Of all that a pickle describes, if what it refers to more than once is written out each time.
MAX_OBJECTS = 10_000_000
#: What stands one after the other in the files of torch before 1.6: three pickles of no matter, the tensors, the storages.
PICKLES_OF_OLD = 5
#: Keys under which training loops put a state dict beside their other state.
WRAPPERS = ("model", "state_dict", "model_state_dict", "adapter")
#: All tensors together, over the file: some are stored once for several names.
MAX_SHARED = 4


def to_pickled(tensors: Mapping[str, Tensor], wrapper: str) -> bytes:
    """The bytes of `torch.save({wrapper: tensors})`, for a tool that reads nothing else."""
    buffer = io.BytesIO()
    torch.save({wrapper: {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}}, buffer)
    return buffer.getvalue()


def read_pickled(path: Path, *, wrapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, by name, on the CPU.

    Args:
        path: the file.
        wrapped: whether they may also be under one of WRAPPERS, beside other state, which is passed over.

    Raises:
        FileFormatError: the file is broken, needs code to be run, or holds anything but a dictionary of plain tensors.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            _check(file, size)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch says to its developers
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FileFormatError(
                f"{path} can't be read as tensors alone, and what may run code is not loaded: {reason}"
            ) from None
    if wrapped and isinstance(content, dict):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content:
        raise FileFormatError(f"{path} holds a {type(content).__name__}; a dictionary of tensors by name is expected")
    tensors = {name: _plain(path, name, value) for name, value in content.items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > MAX_SHARED * size:
        raise FileFormatError(f"{path} has {size:,} bytes, and its tensors are more than {MAX_SHARED} times as large")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _check(file: BinaryIO, size: int) -> None:
    """Raises a ValueError for what would take torch too long, or too much memory."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(PICKLES_OF_OLD):
            _weigh(file)
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which torch's files are not")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its parts are larger than the file")
        for member in members:
            if member.filename.endswith("data.pkl"):
                with archive.open(member) as pickled:
                    _weigh(pickled)


def _weigh(pickled: Any) -> None:
    """Raises a ValueError if what a pickle describes is larger than MAX_OBJECTS, everything written out.

    Nothing is built: the stack holds for each object how many there are in it, and -1 for a mark.
    """
    stack: list[int] = []
    memo: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(pickled):
        name = operation.name
        if "GET" in name:
            stack.append(memo.get(int(argument), 1))
            continue
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
            continue
        if name == "MARK":
            stack.append(-1)
            continue
        taken = 1
        for kind in reversed(operation.stack_before):
            if kind is pickletools.stackslice:
                while stack[-1] != -1:
                    taken += stack.pop()
            else:
                taken += max(stack.pop(), 0)
        if taken > MAX_OBJECTS:
            raise ValueError("it refers to the same objects over and over")
        stack += [taken] * len(operation.stack_after)


def _plain(path: Path, name: Any, value: Any) -> Tensor:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise FileFormatError(f"{path} has a tensor of the name {str(name)[:60]!r}; up to {MAX_NAME:,} characters are expected")
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = f"{value.layout} tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise FileFormatError(f"{path}: {name!r} is of the kind {kind}; plain tensors are expected")
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise FileFormatError(f"{path}: {name} of shape {tuple(value.shape)} has more values than the file has of it")
    return value.detach()
