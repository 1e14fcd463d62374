"""Say whether texts are positive or negative, with what experiments.sst2 trained.

    python -m experiments.predict --adapter DIR "I absolutely loved this product!"
    python -m experiments.predict --adapter DIR < texts.txt     one text a line
    python -m experiments.predict --model RUN/model "dull"      a model that was trained without an adapter
    python -m experiments.predict --merged DIR "a delight"      what `lora_core merge` made; model.pt2 in it is run if there

Prints label, probability and text, separated by tabs, in the order given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from .command import Parser, leave_out_unused, run
from .errors import ExperimentError

BATCH = 32
MAX_CHARACTERS = 100_000  # of a text


def parser() -> Parser:
    """The command line of the prediction."""
    p = Parser(__doc__, prog="python -m experiments.predict")
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter/ directory of a run")
    p.add_argument("--model", help="the base, if it is not where the adapter's file says; alone: the model/ of a run")
    text = "a merged checkpoint; its model.pt2, if there is one, is a program: for those only that you trust"
    p.add_argument("--merged", type=Path, metavar="DIR", help=text)
    p.add_argument("texts", nargs="*", metavar="TEXT", help="texts to judge; without any, each line of standard input")
    return p


def read_texts(given: Sequence[str]) -> list[str]:
    """The texts to judge, from the arguments or else from standard input.

    Raises:
        ExperimentError: there is none, or one is empty.
    """
    if given:
        texts, kind = list(given), "text"
    else:
        if sys.stdin.isatty():
            print("reading one text a line; end with Ctrl-D", file=sys.stderr)
        try:
            texts, kind = sys.stdin.read().removesuffix("\n").split("\n"), "line"
        except UnicodeDecodeError as error:
            where = f"{error.encoding} text (byte {error.start})"
            raise ExperimentError(f"standard input is not {where}; convert it first") from None
        if texts == [""]:
            raise ExperimentError("no text was given; pass one as an argument, or lines on standard input")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ExperimentError(f"{kind} {number} is empty; every {kind} must have something to judge")
        if len(text) > MAX_CHARACTERS:
            raise ExperimentError(f"{kind} {number} has {len(text):,} characters, and {MAX_CHARACTERS:,} are allowed; cut it")
    return texts


class Predictor:
    """A base model with a trained adapter, on the base as it was trained (in NF4 for a QLoRA adapter, in bfloat16 where the
    run computed in that); or, without an adapter, a model that was trained itself.

    Raises:
        ExperimentError: neither is given, or what is given is not of a run.
    """

    def __init__(self, adapter: Path | None, model: str | None = None, merged: Path | None = None) -> None:
        import torch

        from . import models, record
        from .precision import autocast

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if merged is not None:
            if adapter is not None or model is not None:
                raise ExperimentError("--merged needs neither --adapter nor --model: everything is in its directory")
            from .export import load_merged

            self.model, self.tokenizer, self.max_length, self.device = load_merged(merged, self.device)
            self.computing = nullcontext()
            return
        if adapter is not None:
            from .adapted import load_adapted

            loaded, note = load_adapted(adapter, model, models.load_classifier)
        elif model is None:
            raise ExperimentError(
                "give --adapter, the adapter/ directory of a run, or --model, its model/ directory, or --merged"
            )
        else:
            base = models.resolve(model)
            loaded, note = models.load_classifier(base), record.AdapterNote.read(base.directory)
            if loaded.new:
                raise ExperimentError(f"model: {model!r} has no trained head for two labels; name an adapter with --adapter")
        self.model, self.tokenizer, self.max_length = loaded.model.to(self.device).eval(), loaded.tokenizer, note.max_length
        self.computing = autocast(note.precision, self.device)

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[str, float]]:
        """The label of each text and its probability."""
        import torch

        from .batches import LikeLengthBatches, TokenisedTexts
        from .data import LABELS

        tokens = TokenisedTexts(self.tokenizer, texts, self.max_length)
        probabilities = torch.empty(len(texts), len(LABELS))
        with torch.inference_mode():
            for indices in LikeLengthBatches(tokens.lengths, BATCH):
                batch = {name: tensor.to(self.device) for name, tensor in tokens[indices].items()}
                with self.computing:
                    logits = self.model(**batch).logits  # B labels
                probabilities[indices] = logits.float().softmax(-1).cpu()
        for row in probabilities:
            yield LABELS[int(row.argmax())], float(row.max())


def predict(adapter: Path | None, model: str | None, merged: Path | None, given: Sequence[str]) -> None:
    """Print label, probability and text for each text."""
    texts = read_texts(given)
    for (label, probability), text in zip(Predictor(adapter, model, merged)(texts), texts, strict=True):
        print(f"{label}\t{probability:.3f}\t{text}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: predict(args.adapter, args.model, args.merged, args.texts))


if __name__ == "__main__":
    if not any(argument.startswith("--merged") for argument in sys.argv):  # an exported program needs some of them
        leave_out_unused()
    sys.exit(main())
