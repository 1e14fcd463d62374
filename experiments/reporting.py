"""What the runs below a directory came to, as Markdown: a table for each budget, what the study claims, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_core.files.disk import write_whole

from . import claims, measured, provenance, published, reference
from .beginning import RESULTS
from .errors import ExperimentError
from .expected import NOT_RUN, Judgement, judge, unmatched
from .measured import Group, Row, percent
from .sweep import CSV
from .table import markdown

REPORT = "report.md"
FIGURES = "figures"
COLUMNS = (
    "method", "accuracy", "95 % interval", "F1", "trained, adapter only", "trained, with head", "base weights",
    "peak memory", "peak GPU", "training", "seeds",
)  # fmt: skip
HOW = (
    "Accuracy and F1 are those of the last epoch, means over the seeds, ± one standard deviation where there are several; the "
    "interval is Wilson's, of the mean, for one set of validation sentences. Trained parameters are shares of all that the "
    "model holds. Base weights, the head included, are bytes counted on the model; peak memory is the most that the process "
    "held, measured by the system, and peak GPU what torch allocated there: the least and the largest of the seeds. Training "
    "is its time alone, without loading and evaluating. Differences are paired over seeds and sentences; behind ± is half "
    "their 95 % interval. `experiments/claims.py` says what contradicts each finding."
)

AIMS = "Aims (half a point is one of the mean, whose interval must be at most 1 point either way)"


def write(directory: Path) -> Path:
    """Writes the report on the runs below `directory`, and its figures; returns the report's path.

    Raises:
        ExperimentError: there is no run there.
    """
    runs = measured.read(directory)
    if not runs:
        raise ExperimentError(f"--output-dir: there is no run below {str(directory)!r}; run python -m experiments.compare")
    groups = measured.grouped(runs)
    figures = _figures(groups[0], directory / FIGURES)
    text = (
        "\n\n".join(
            [
                "# Results",
                HOW,
                made_by(runs, directory),
                *_sections(groups, figures),
                *_precision(groups),
                *_beside(reference.of(directory)),
                *_published(),
                _check(runs, directory),
            ]
        )
        + "\n"
    )
    write_whole(directory / REPORT, text.encode())
    return directory / REPORT


def require_matplotlib() -> None:
    """Raises an ExperimentError where the figures can't be drawn: better before hours of training than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ExperimentError("the figures need matplotlib; run pip install 'lora-core[compare]'") from None


def _figures(group: Group, directory: Path) -> list[Path]:
    require_matplotlib()
    from .figures import draw

    return draw(group, directory)


def _sections(groups: Sequence[Group], figures: Sequence[Path]) -> list[str]:
    parts = []
    for group in groups:
        parts += [f"## {group.budget}", table(group), _machine(group)]
        if group is groups[0]:
            parts.append("\n".join(f"![{path.stem.replace('_', ' ')}]({FIGURES}/{path.name})" for path in figures))
        # The first group is the study; of the others, what can be said.
        for title, found in (("The study's findings", claims.findings(group)), (AIMS, claims.aims(group))):
            shown = [claim for claim in found if group is groups[0] or claim.verdict != claims.NOT_RUN]
            if shown:
                parts.append(f"{title}:\n\n" + "\n".join(map(_claim, shown)))
    return parts


def _precision(groups: Sequence[Group]) -> list[str]:
    """What bfloat16 costs, where both precisions were run."""
    found = claims.of_precision(groups)
    return ["## bfloat16 beside float32", "\n".join(map(_claim, found))] if found else []


def _claim(claim: claims.Claim) -> str:
    return f"- {claim.text}: **{claim.verdict}**." + (f" {claim.numbers}." if claim.numbers else "")


def table(group: Group) -> str:
    """The rows of one budget as Markdown."""
    return markdown(COLUMNS, [_cells(row) for row in group.rows])


def _cells(row: Row) -> list[str]:
    low, high = row.interval
    deviation = f" ± {100 * row.deviation:.1f}" if row.deviation is not None else ""
    total, gpu = row.mean("total_parameters"), row.all("peak_cuda_mb")
    return [
        row.label,
        f"{100 * row.accuracy:.1f}{deviation} %",
        f"{100 * low:.1f} to {100 * high:.1f} %",
        f"{row.mean('f1'):.3f}",
        _share(row.mean("adapter_parameters"), total),
        _share(row.mean("trainable_parameters"), total),
        f"{row.mean('base_weight_bytes') / 2**20:.1f} MiB",
        f"{claims.spread(row.all('peak_rss_mb'))} MiB",
        f"{claims.spread(gpu)} MiB" if gpu else "-",
        _duration(row.mean("train_seconds")),
        ", ".join(str(run["seed"]) for run in row.runs),
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s" if seconds else "-"


def _share(count: float, total: float) -> str:
    return f"{count:,.0f} ({100 * count / total:.3g} %)" if count else "-"


def _machine(group: Group) -> str:
    runs = [run for row in group.rows for run in row.runs]
    devices = " and ".join(sorted({str(run.metrics.get("device")) for run in runs}))
    libraries = [run.metrics.get("versions", {}) for run in runs]
    versions = {", ".join(f"{name} {found.get(name, '?')}" for name in ("torch", "transformers")) for found in libraries}
    known = [run.metrics[provenance.KEY] for run in runs if run.metrics.get(provenance.KEY)]
    processors = " and ".join(sorted({found["processor"] for found in known}))
    loads = [found["load_before"] for found in known if found.get("load_before") is not None]
    busy = f"; load before a run up to {max(loads):.1f}" if loads else ""
    return f"On {devices}{f' ({processors})' if processors else ''}; {' and '.join(sorted(versions))}{busy}."


def _beside(rows: Sequence[reference.Row]) -> list[str]:
    """peft's rows, and the tables of engine x harness, if there are any."""
    if not rows:
        return []
    same: dict[tuple[str, str, str], list[reference.Row]] = {}
    for row in sorted(rows, key=lambda row: (row["data"], -row["train"], row["method"], row["engine"], row["harness"] or "")):
        work = f"{row['method']}, {row['train']:,} of {row['data']} x {row['settings']['epochs']}, {reference.precision(row)}"
        harness = {"ours": "our harness", "plain": "plain Trainer", None: "not kept"}[row["harness"]]
        same.setdefault((work, row["engine"], harness), []).append(row)
    cells = [
        (
            *cell,
            percent(sum(row["accuracy"] for row in found) / len(found)),
            f"{claims.spread([row['peak_rss_mb'] for row in found])} MiB",
            ", ".join(str(seed) for seed in sorted(row["seed"] for row in found)),
        )
        for cell, found in same.items()
    ]
    split = [str(found) for method in ("lora", "qlora") if (found := reference.two_by_two(rows, method))]
    return [
        "## peft beside it",
        "The same data, base, batches and settings (`python -m bench reference`): which engine prepares the model and puts the "
        "adapters on, and which harness trains.",
        markdown(("work", "engine", "harness", "accuracy", "peak memory", "seeds"), cells),
        *(["\n".join(f"- {text}." for text in split)] if split else []),
    ]


def _published() -> list[str]:
    header = ("method", "published share", "adapter only", "with head", "all parameters")
    return [
        "## Where the published figures do not add up",
        "The study that this one re-implements published a table for DistilBERT on SST-2. Recounted from the architecture:",
        markdown(header, list(published.recounted())),
        "\n".join(f"- {text}" for text in published.disagreements()),
    ]


def made_by(runs: Sequence[measured.Run], directory: Path) -> str:
    """Which of the results in a directory are not the present code's, in a sentence and a line for each."""
    if not (other := outdated(runs, directory)):
        peft = f" and peft's {len(reference.of(directory))} rows" if directory.resolve() == RESULTS else ""
        return f"All {len(runs)} results{peft} were made by the present code."
    again = (
        "`make results` makes them" if directory.resolve() == RESULTS else "with --refresh the command that made them does it"
    )
    text = f"{len(other)} of the results are not what the present code makes; {again} again:"
    return f"{text}\n\n" + "\n".join(f"- {line}" for line in other)


def outdated(runs: Sequence[measured.Run], directory: Path) -> list[str]:
    """What other code made, a line each; of the committed results also what has other settings than its method has now, or is
    missing."""
    from .remake import absent, other_trials

    committed = directory.resolve() == RESULTS
    found = []
    for run in runs:
        other = [_code(run)] if run.differing else []
        other += [f"other settings: {run.label}"] if committed and run.label != run["method"] else []
        found += [f"{run.name}, {run.budget.precision}: {'; '.join(other)}"] if other else []
    if not committed:
        return found
    rows, trials = reference.of(directory), other_trials(directory / "sweep" / CSV)
    found += [f"sweep/{CSV}: {trials}"] if trials else []
    return [*found, *absent(runs), *measured.apart(runs), *reference.outdated(rows), *unmatched(runs, rows)]


def _code(run: measured.Run) -> str:
    known = run.metrics.get(provenance.KEY)
    return f"other {' and '.join(run.differing)} (version {known['version']})" if known else "recorded no code"


def _check(runs: Sequence[measured.Run], directory: Path) -> str:
    return "## Expected and found\n\n" + check_table(judge(runs, reference.of(directory)))


def check_table(judged: Sequence[Judgement]) -> str:
    """Every expectation and its verdict, what was not run last."""
    rows = sorted(judged, key=lambda row: row.verdict == NOT_RUN)
    cells = [(row.what, row.expected, row.found, row.source, row.verdict) for row in rows]
    return markdown(("what", "expected", "found", "source", "verdict"), cells)
