"""Talk to a language model with an adapter, or to a merged one.

    python -m experiments.chat --adapter DIR                      a conversation; Ctrl-D ends it, /new begins another
    python -m experiments.chat --adapter DIR --compare "Hello"    one answer, and that of the base without the adapter
    python -m experiments.chat --merged DIR < questions.txt       a question a line, each by itself

Answers are greedy: the same question has the same answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .predict import read_texts

ANEW = "/new"


def parser() -> Parser:
    """The command line of the conversation."""
    p = Parser(__doc__, prog="python -m experiments.chat")
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter/ directory of a run, or another adapter")
    p.add_argument("--model", help="the base, if it is not where the adapter's file says; alone: the base as it is")
    p.add_argument("--merged", type=Path, metavar="DIR", help="a merged checkpoint, or the model/ directory of a run")
    p.add_argument("--compare", action="store_true", help="give the answer of the base without the adapter, too")
    p.add_argument("--system", metavar="TEXT", help="what the model is told first; if not given, what its template says")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="an answer is cut off after so many tokens")
    p.add_argument("questions", nargs="*", metavar="TEXT", help="questions, each by itself; without any, a conversation")
    return p


class Speaker:
    """A language model that answers.

    Raises:
        ExperimentError: what is given is no language model, or there is nothing to compare with.
    """

    def __init__(self, adapter: Path | None, model: str | None, merged: Path | None, compare: bool, tokens: int) -> None:
        if tokens < 1:
            raise ExperimentError(f"--max-new-tokens must be at least 1, not {tokens}")
        if (merged is None) == (adapter is None and model is None):
            raise ExperimentError("give --adapter, the adapter/ directory of a run, or --merged, or --model alone")
        if compare and adapter is None:
            raise ExperimentError("--compare needs --adapter: a merged model has its base no longer")
        import torch

        from . import models, record
        from .adapted import load_adapted
        from .completions import Template
        from .language_models import load_language_model
        from .precision import autocast

        if adapter is not None:
            loaded, note = load_adapted(adapter, model, load_language_model)
        else:
            base = models.resolve(model if merged is None else str(merged))
            loaded, note = load_language_model(base), record.AdapterNote.read(base.directory)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.computing = loaded.model.to(device).eval(), autocast(note.precision, device)
        self.template, self.tokens = Template(loaded.tokenizer), tokens
        self.adapted, self.compare = adapter is not None, compare

    def answers(self, prompt: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """(who, what) for the messages so far, each (role, content): the model, and the base if it is to be compared."""
        from lora_core import disable_adapters

        from .conversations import Conversation
        from .generation import greedy

        ids = self.template.prompt_ids(Conversation(tuple(prompt), "", "the question"))
        for who in ("adapter" if self.adapted else "model", *(["base"] if self.compare else [])):
            with self.computing, disable_adapters(self.model) if who == "base" else nullcontext():
                (answer,) = greedy(self.model, self.template.tokenizer, [ids], self.tokens)
            yield who, answer


def ask(speaker: Speaker, prompt: Sequence[tuple[str, str]]) -> str:
    """Prints what is answered, with a name before it where there are two; returns the model's own answer."""
    answers = list(speaker.answers(prompt))
    for who, text in answers:
        print(f"{who + ':':9}{text}" if speaker.compare else text, flush=True)
    return answers[0][1]


def converse(speaker: Speaker, start: Sequence[tuple[str, str]]) -> None:
    """A conversation at the terminal, in which the model sees what was said before."""
    print(f"Ctrl-D ends the conversation, {ANEW} begins another", file=sys.stderr)
    said = list(start)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question == ANEW:
            said = list(start)
        elif question:
            answer = ask(speaker, [*said, ("user", question)])
            said += [("user", question), ("assistant", answer)]


def chat(args: argparse.Namespace) -> None:
    """Answer the questions that are given, or converse."""
    start = [("system", args.system)] if args.system else []
    talks = not args.questions and sys.stdin.isatty()
    questions = [] if talks else read_texts(args.questions)
    speaker = Speaker(args.adapter, args.model, args.merged, args.compare, args.max_new_tokens)
    if talks:
        converse(speaker, start)
    for question in questions:
        ask(speaker, [*start, ("user", question)])


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: chat(args), interrupted="the conversation is over")


if __name__ == "__main__":
    leave_out_unused()
    sys.exit(main())
