"""A merged classifier as one program: torch.export's graph and weights in a file, for any batch and length.

    python -m lora_core merge --adapter RUN/adapter --output DIR
    python -m experiments.export --merged DIR               writes DIR/model.pt2, checked against the model itself
    python -m experiments.predict --merged DIR "a delight"  runs it: the model's own code is not needed any more

In Python torch.export.load("DIR/model.pt2").module()(input_ids, attention_mask) gives the logits, (batch, labels); both
arguments are (batch, length) int64. AOTInductor compiles the same file for C++. Load only files that you trust.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import Parser, run
from .errors import ExperimentError

PROGRAM = "model.pt2"
#: What is exported must compute the same; the compiler may order float32 sums otherwise.
TOLERANCE = 1e-5
CHECKED_SHAPES = ((1, 1), (1, 7), (3, 33), (5, 64))


def parser() -> Parser:
    """The command line of the export."""
    p = Parser(__doc__, prog="python -m experiments.export")
    p.add_argument("--merged", type=Path, required=True, metavar="DIR", help="directory that `python -m lora_core merge` made")
    return p


def export(directory: Path) -> float:
    """Writes `directory`/model.pt2; returns the largest deviation of a logit, as a share of the largest one.

    Raises:
        ExperimentError: the directory holds no trained classifier, or one that can't be exported exactly.
    """
    import torch
    from torch import Tensor, nn

    from lora_core.files.disk import write_whole

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # B T, B T -> B labels
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    classifier = Logits(_classifier(directory)[0]).eval()
    vocabulary = classifier.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, (length + 1) // 2 :] = 0  # a text that is half padding
        return torch.randint(vocabulary, (size, length), generator=generator), mask

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": free, "attention_mask": free}
    try:
        program = torch.export.export(classifier, batch(2, 16), dynamic_shapes=shapes)
    except Exception as error:  # of many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExperimentError(f"--merged: {str(directory)!r} can't be exported: {reason[0]}") from None
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded, worst = torch.export.load(io.BytesIO(file.getvalue())).module(), 0.0
    with torch.no_grad():
        for size, length in CHECKED_SHAPES:
            arguments = batch(size, length)
            expected = classifier(*arguments)
            worst = max(worst, ((loaded(*arguments) - expected).abs().max() / expected.abs().max()).item())
    if not worst <= TOLERANCE:
        raise ExperimentError(f"the exported program's logits are off by {worst:.2g}, and at most {TOLERANCE} is rounding")
    try:
        write_whole(directory / PROGRAM, file.getvalue())
    except OSError as error:
        raise ExperimentError(f"{directory / PROGRAM} can't be written: {error.strerror or error}") from None
    return worst


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
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExperimentError(f"--merged: {str(directory)!r} can't be loaded: {reason[0]}") from None

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=program(input_ids, attention_mask))

    return model, tokenizer, _length(tokenizer), "cpu"  # where it was exported


def _classifier(directory: Path) -> tuple[Any, Any]:
    from . import models

    classifier = models.load_classifier(models.resolve(str(directory)))
    if classifier.new:
        raise ExperimentError(f"--merged: {str(directory)!r} has no trained head for two labels; merge an adapter of a run")
    return classifier.model, classifier.tokenizer


def _length(tokenizer: Any) -> int:
    return min(tokenizer.model_max_length, 512)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def command() -> None:
        worst = export(args.merged)
        print(f"wrote {args.merged / PROGRAM}: logits off by at most {worst:.2g} of the largest, any batch and length")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
