"""Run an experiment cell by cell, and write its table beside the published figures."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plotly.offline import get_plotlyjs

from mdistiller.analysis.measures import Measured, Picture
from mdistiller.analysis.report.markup import counted, drawn
from mdistiller.analysis.report.style import SCRIPT, STYLE
from mdistiller.analysis.runs import Figure, Run, figure, load_run
from mdistiller.errors import DataError
from mdistiller.recipes.cells import Cell
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.folder import CONFIG, check_resumable
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import train, train_together


@dataclass(frozen=True)
class Result:
    """A cell's runs summed up.

    seeds: how many are finished; 0: none, and the figures are None.
    last, best: test top-1 of the last epoch and of the best one, in percent, over seeds.
    seconds: of training and evaluation, the mean of a run.
    hardware: GPU, or CPU and threads.
    commits: of the source, each once.
    """

    cell: Cell
    seeds: int
    last: Figure | None
    best: Figure | None
    seconds: float | None
    hardware: str
    commits: tuple[str, ...]


def is_finished(config: ClassificationConfig) -> bool:
    """Whether the run in `config.out` has come to its end.

    Raises:
        ConfigError: the folder holds another run.
    """
    assert config.out is not None
    if not (config.out / CONFIG).exists():
        return False
    check_resumable(config)
    run = _load(config.out)
    return run is not None and run.summary is not None


def run_all(configs: Sequence[ClassificationConfig], reporter: Reporter) -> None:
    """Train into each `config.out`, or go on there: one run, or several side by side."""
    resume = [config.out is not None and (config.out / CONFIG).exists() for config in configs]
    if len(configs) == 1:
        train(configs[0], resume=resume[0], reporter=reporter)
    else:
        train_together(configs, resume=resume, reporter=reporter)


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """The run folder of a cell and seed."""
    return out / "runs" / re.sub(r"[^\w.+-]+", "-", f"{cell.pair}.{cell.setting}-s{seed}").replace("-.", ".")


def finished(out: Path, cell: Cell, seeds: int) -> list[Run]:
    """A cell's finished runs; unfinished ones don't count."""
    loaded = (_load(folder_of(out, cell, seed)) for seed in range(seeds))
    return [run for run in loaded if run is not None and run.summary is not None]


def results(out: Path, cells: Sequence[Cell], seeds: int) -> list[Result]:
    """What the finished runs give for each cell."""
    return [_sum_up(cell, finished(out, cell, seeds)) for cell in cells]


def _load(folder: Path) -> Run | None:
    try:
        return load_run(folder)
    except DataError:
        return None


def _sum_up(cell: Cell, runs: list[Run]) -> Result:
    if not runs:
        return Result(cell, 0, None, None, None, "", ())
    final = [run.evals[-1] for run in runs]
    env = runs[0].env
    hardware = env["gpus"][0] if env["gpus"] else f"{env['cpu']}, {counted(env['threads'], 'thread')}"
    return Result(
        cell,
        len(runs),
        figure([line["top1"] for line in final]),
        figure([line["best_top1"] for line in final]),
        sum(line["seconds"] for line in final) / len(final),
        hardware,
        tuple(dict.fromkeys(_short(run.env["commit"]) for run in runs)),
    )


def _short(commit: str | None) -> str:
    """A commit's first digits, with its mark for a changed source tree."""
    return "unknown" if commit is None else commit[:9] + "+" * commit.endswith("+")


HEAD = ("teacher → student", "setting", "seeds", "last, %", "best, %", "published, %", "seconds")


def rows(
    found: Sequence[Result], name_of: Callable[[str], str], measured: Measured | None = None
) -> list[list[str]]:
    """The table as text, without its head; what was not run is empty."""
    lines = []
    for result in found:
        cell = result.cell
        published = "" if cell.published is None else f"{cell.published:.2f}"
        if published and not cell.checked:
            published += " (unchecked)"
        ran = result.seeds > 0
        lines.append(
            [
                name_of(cell.pair),
                cell.setting,
                str(result.seeds),
                str(result.last) if ran else "",
                str(result.best) if ran else "",
                published,
                f"{result.seconds:.0f}" if result.seconds is not None else "",
            ]
        )
        if measured is not None:
            nothing = ("",) * len(measured.columns)
            lines[-1] += measured.values.get((cell.pair, cell.setting), nothing)
    return lines


def write_tables(
    out: Path,
    name: str,
    title: str,
    notes: Sequence[str],
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    pictures: Sequence[Picture] = (),
) -> list[Path]:
    """NAME.md, NAME.csv and NAME.html in `out`: title, table, notes; the page has the pictures, too."""
    head = list(head)
    bars = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    bars.insert(1, "| --- | --- |" + " ---: |" * (len(head) - 2))
    markdown = "\n".join([f"# {title}", "", *bars, "", *(f"- {note}" for note in notes), ""])
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([head, *lines])
    header = _row(f'<th scope="col">{html.escape(text)}</th>' for text in head)
    body = "".join(_row(f"<td>{html.escape(text)}</td>" for text in line) for line in lines)
    told = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>"
        f'<div class="scroll"><table><thead>{header}</thead><tbody>{body}</tbody></table></div>'
        f"{_drawn(pictures)}{told}</main></body></html>"
    )
    paths = [out / f"{name}.{kind}" for kind in ("md", "csv", "html")]
    for path, text in zip(paths, (markdown, sheet.getvalue(), page), strict=True):
        write_text(path, text)
    return paths


def _drawn(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    plots = (drawn(name, plot, text, height=plot.layout.height) for name, plot, text in pictures)
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots)
    return f"<script>{get_plotlyjs()}</script>{figures}<script>{SCRIPT}</script>"


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def notes_of(found: Sequence[Result], command: str, teachers: dict[str, dict[str, float]]) -> list[str]:
    """How the figures were made: command, hardware, commits, teachers; what best and published mean."""
    hardware = dict.fromkeys(result.hardware for result in found if result.hardware)
    commits = dict.fromkeys(commit for result in found for commit in result.commits)
    told = [f"{name} {figures['top1']:.2f} %" for name, figures in teachers.items()]
    return [
        f"Command: `{command}`",
        f"Hardware: {'; '.join(hardware) or 'nothing was run'}. Commit: {', '.join(commits) or '–'}.",
        f"Teachers, top-1 on the same test images: {'; '.join(told) or '–'}.",
        "Mean ± standard deviation (n − 1) over seeds. `best` is picked on the test set. Empty: not run. "
        "Published figures marked (unchecked) were taken down from memory.",
    ]


def write_json(path: Path, value: object) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")
