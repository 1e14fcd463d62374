"""A merged model as one program: torch.export's graph and weights in a file, for any batch and length.

    python -m lora_core merge --adapter RUN/adapter --output DIR
    python -m experiments.export --merged DIR               writes DIR/model.pt2, checked against the model itself
    python -m experiments.export --merged DIR --onnx        and DIR/model.onnx, checked in ONNX Runtime
    python -m experiments.predict --merged DIR "a delight"  runs a classifier: its own code is not needed any more

In Python torch.export.load("DIR/model.pt2").module()(input_ids, attention_mask) gives the logits, (batch, labels) of a
classifier and (batch, length, words) of a causal language model; both arguments are (batch, length) int64. A program keeps no
keys and values between calls. AOTInductor compiles the same file for C++. Load only files that you trust.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .command import Parser, run
from .errors import ExperimentError

PROGRAM, ONNX = "model.pt2", "model.onnx"
#: What is exported must compute the same; the compiler may order float32 sums otherwise.
TOLERANCE = 1e-5
CHECKED_SHAPES = ((1, 1), (1, 7), (3, 33), (5, 64))


def parser() -> Parser:
    """The command line of the export."""
    p = Parser(__doc__, prog="python -m experiments.export")
    p.add_argument("--merged", type=Path, required=True, metavar="DIR", help="directory that `python -m lora_core merge` made")
    p.add_argument("--onnx", action="store_true", help="write ONNX too; pip install onnxscript onnxruntime")
    return p


def export(directory: Path, onnx: bool = False) -> dict[str, float]:
    """Writes `directory`/model.pt2, and model.onnx; {file: largest deviation of a logit, as a share of the largest one}.

    Raises:
        ExperimentError: the directory holds no trained classifier and no causal language model, or one that can't be exported
            exactly; or what ONNX takes is not installed.
    """
    import torch
    from torch import Tensor, nn

    from lora_core.files.disk import write_whole

    class Logits(nn.Module):
        def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
            super().__init__()
            self.model, self.settings = model, settings

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # B T, B T -> B labels, or B T V
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.settings).logits

    if onnx:
        _need_onnx()
    model = Logits(*_model(directory)).eval()
    vocabulary = model.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, (length + 1) // 2 :] = 0  # a text that is half padding
        return torch.randint(vocabulary, (size, length), generator=generator), mask

    def deviation(found: Callable[..., Tensor]) -> float:
        worst = 0.0
        with torch.no_grad():
            for size, length in CHECKED_SHAPES:
                ids, mask = batch(size, length)
                expected = model(ids, mask)
                off = (found(ids, mask) - expected).abs()
                if off.dim() == 3:  # what is said after padding is nothing
                    off = off[mask.bool()]
                worst = max(worst, (off.max() / expected.abs().max()).item())
        if not worst <= TOLERANCE:
            raise ExperimentError(f"the exported program's logits are off by {worst:.2g}, and at most {TOLERANCE} is rounding")
        return worst

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": free, "attention_mask": free}
    files, worst = {}, {}
    try:
        program = torch.export.export(model, batch(2, 16), dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file)
        files[PROGRAM] = file.getvalue()
        if onnx:
            files[ONNX] = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    except Exception as error:  # of many kinds
        raise ExperimentError(f"--merged: {str(directory)!r} can't be exported: {_reason(error)}") from None
    worst[PROGRAM] = deviation(torch.export.load(io.BytesIO(files[PROGRAM])).module())
    if onnx:
        worst[ONNX] = deviation(_in_onnx_runtime(files[ONNX]))
    for name, data in files.items():
        try:
            write_whole(directory / name, data)
        except OSError as error:
            raise ExperimentError(f"{directory / name} can't be written: {error.strerror or error}") from None
    return worst


def _need_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExperimentError(f"--onnx: pip install onnxscript onnxruntime ({error})") from None


def _in_onnx_runtime(data: bytes) -> Callable[..., Any]:
    """A program in ONNX as a function of tensors."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def found(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])

    return found


def load_merged(directory: Path, device: str) -> tuple[Any, Any, int, str]:
    """(model, tokenizer, tokens that it reads of a text, device) of a merged checkpoint: its program, if it was exported.

    An exported program is code, which torch runs: only what was exported here, or by someone whom you trust, should be loaded.

    Raises:
        ExperimentError: it is no merged checkpoint.
    """
    import torch

    if not (directory / PROGRAM).is_file():
        model, tokenizer = _classifier(directory)
        return model.to(device).eval(), tokenizer, _length(tokenizer), device
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from . import models

    try:
        program = torch.export.load(directory / PROGRAM).module()
        tokenizer = AutoTokenizer.from_pretrained(directory, **models.LOCAL)
    except Exception as error:  # of many kinds
        raise ExperimentError(f"--merged: {str(directory)!r} can't be loaded: {_reason(error)}") from None

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=program(input_ids, attention_mask))

    return model, tokenizer, _length(tokenizer), "cpu"  # where it was exported


def _model(directory: Path) -> tuple[Any, dict[str, Any]]:
    """The model, a classifier or a causal language model, and what its forward is told besides."""
    from lora_core.files.checkpoint import read_config

    from . import models
    from .language_models import load_language_model

    classes = read_config(directory).get("architectures") or [""]
    if str(classes[0]).endswith(("ForCausalLM", "LMHeadModel")):
        return load_language_model(models.resolve(str(directory))).model, {"use_cache": False}
    return _classifier(directory)[0], {}


def _classifier(directory: Path) -> tuple[Any, Any]:
    from . import models

    classifier = models.load_classifier(models.resolve(str(directory)))
    if classifier.new:
        raise ExperimentError(f"--merged: {str(directory)!r} has no trained head for two labels; merge an adapter of a run")
    return classifier.model, classifier.tokenizer


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _length(tokenizer: Any) -> int:
    return min(tokenizer.model_max_length, 512)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def command() -> None:
        for name, worst in export(args.merged, args.onnx).items():
            print(f"wrote {args.merged / name}: logits off by at most {worst:.2g} of the largest, any batch and length")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
