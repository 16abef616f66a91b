"""One self-contained HTML page over runs: it loads nothing, and works from a file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from mdistiller.analysis.report.boxes import boxes
from mdistiller.analysis.report.classes import confusions, gains
from mdistiller.analysis.report.curves import cost, over_training, transfer
from mdistiller.analysis.report.headline import headline
from mdistiller.analysis.report.markup import Section, counted, paragraph
from mdistiller.analysis.report.settings import making, settings
from mdistiller.analysis.report.spaces import correlations, embeddings
from mdistiller.analysis.report.students import look
from mdistiller.analysis.report.style import SCRIPT, STYLE
from mdistiller.analysis.runs import Run, group, load_run, summarise, tested_on
from mdistiller.errors import DataError
from mdistiller.runs.checkpoint import write_text


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    images: int = 0,
    device: str = "auto",
) -> Path:
    """Write the page for some run folders.

    Args:
        folders: run folders, finished or under way.
        out: the HTML file.
        title: headline; empty takes the data's name and the number of runs.
        notes: paragraphs of plain text shown above the table.
        images: how many test images the runs' students are shown, for the parts on classes, confusions,
            features and correlations, or, a few of them, with the boxes of detectors; 0 leaves these out, and
            the models alone.
        device: where that is computed: auto (a GPU if there is one), cpu, cuda or cuda:N.

    Returns:
        `out`.

    Raises:
        DataError: a folder is no run, or some are of detectors and some of classifiers.
        ConfigError: no such device.
    """
    runs = [load_run(folder) for folder in folders]
    if len({run.figure for run in runs}) > 1:
        raise DataError("runs of detectors and of classifiers have no figure in common: a page for each kind")
    tests = list(dict.fromkeys(map(tested_on, runs)))
    title = title or f"{' and '.join(tests)}: {counted(len(runs), 'run')}"
    if len(tests) > 1:
        notes = [*notes, "Not all of these runs have the same test images: figures on others do not compare."]
    page = _page(title, notes, _sections(runs, images, device))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _sections(runs: list[Run], images: int, device: str) -> list[Section]:
    groups, rows = group(runs), summarise(runs)
    parts = [headline(rows), *over_training(groups, rows), *cost(rows), *transfer(groups)]
    if images and runs[0].detects:
        parts += boxes(groups, images, device)
    elif images:
        seen = look(groups, images, device)
        parts += [*gains(seen), *confusions(seen), *embeddings(seen), *correlations(seen), *seen.note()]
    return [*parts, *settings(groups), making(runs, seen=images > 0)]


def _page(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text, _ in sections)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f"<script>{get_plotlyjs()}</script></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        *map(paragraph, notes),
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        *(
            f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(text)}</h2>{body}</section>'
            for name, text, body in sections
        ),
        f"</main><script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)
