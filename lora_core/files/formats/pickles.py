"""State dicts in torch's own files, for tools that know no other. The one place where such files are read or written.

A pickle can run code, so it is read by torch's `weights_only` reader, which makes tensors and plain containers alone, after the
zip around it was found to be of the size that it says. Nothing else than tensors is written.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FileFormatError
from ..pickled import check_pickled
from ..reading import open_file

#: Keys under which training loops put a state dict beside their other state.
WRAPPERS = ("model", "state_dict", "model_state_dict", "adapter")


def to_pickle(tensors: Mapping[str, Tensor], wrapper: str) -> bytes:
    """The bytes of `torch.save({wrapper: tensors})`."""
    buffer = io.BytesIO()
    torch.save({wrapper: {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}}, buffer)
    return buffer.getvalue()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file that `torch.save` wrote, alone or beside other state of a training loop.

    Raises:
        FileFormatError: it is broken, or holds more than tensors, or tensors of another size than their storage.
    """
    try:
        with open_file(path) as file:
            check_pickled(file, path.stat().st_size)
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
    except FileFormatError:
        raise
    except Exception as error:  # the reader raises many kinds; what was wrong is in the first line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileFormatError(f"{path} is not a file of torch.save's that holds tensors alone: {reason}") from None
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not found:
        raise FileFormatError(f"{path} holds a {type(found).__name__}; a state dict, {{name: tensor}}, is expected")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FileFormatError(f"{path}: {name!r} is a {type(tensor).__name__}; a state dict holds tensors alone")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise FileFormatError(f"{path}: {name} is a {tensor.layout} tensor on {tensor.device}; a plain one is expected")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise FileFormatError(f"{path}: {name} is larger than what is stored of it; it was not saved by torch.save")
    if sum(tensor.nbytes for tensor in found.values()) > path.stat().st_size:
        raise FileFormatError(f"{path} holds tensors that are larger than it; they share their values, which is not read")
    return {name: tensor.detach() for name, tensor in found.items()}
