"""Composes the page from its sections. The page loads nothing, and works from a file."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from mdistiller.analysis.report.bought import bought
from mdistiller.analysis.report.classes import confusions, gains
from mdistiller.analysis.report.curves import cost, over_training, transfer
from mdistiller.analysis.report.markup import Section, counted, document, paragraph
from mdistiller.analysis.report.published import published
from mdistiller.analysis.report.spaces import correlations, embeddings
from mdistiller.analysis.report.students import missing_parts, run_models
from mdistiller.analysis.report.tables import headline, making, settings
from mdistiller.analysis.runs import Run, group, load_run, summarise, test_set_of
from mdistiller.errors import DataError
from mdistiller.runs.checkpoint import write_text


def _classifiers(groups: Mapping[str, Sequence[Run]], images: int, device: str) -> list[Section]:
    found = run_models(groups, images, device)
    sections = (*gains(found), *confusions(found), *embeddings(found), *correlations(found))
    return [*sections, *missing_parts(found.failures)]


def _detectors(groups: Mapping[str, Sequence[Run]], images: int, device: str) -> list[Section]:
    from mdistiller.analysis.report.boxes import boxes  # needs torchvision, which takes a second to load

    return boxes(groups, images, device)


_MODEL_SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Sequence[Run]], int, str], list[Section]]]] = {
    "classification": ("classes, confusions, features and correlations", _classifiers),
    "detection": ("boxes on test images", _detectors),
}
"""By task, the sections for which the students run on test images: in words, and the function."""


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    images: int = 0,
    device: str = "auto",
) -> Path:
    """Writes the page about some run folders.

    Args:
        folders: run folders, finished or under way.
        out: the HTML file, which is also returned.
        title: headline; by default the name of the data and the number of runs.
        notes: paragraphs of plain text above the table.
        images: largest number of test images on which the students run, for the sections on classes,
            confusions, features and correlations, or on boxes (at most six images). 0 leaves these sections
            out; then neither models nor data are needed.
        device: device of the models: auto (a GPU if there is one), cpu, cuda, cuda:N or mps.

    Raises:
        DataError: a folder is no run, or the runs have different metrics, such as detectors and classifiers.
        ConfigError: no such device.
    """
    runs = [load_run(folder) for folder in folders]
    metrics = list(dict.fromkeys(run.metric for run in runs))
    if len(metrics) > 1:
        raise DataError(f"the runs have different metrics ({', '.join(metrics)}): write a page for each kind")
    tests = list(dict.fromkeys(map(test_set_of, runs)))
    title = title or f"{' and '.join(tests)}: {counted(len(runs), 'run')}"
    if len(tests) > 1:
        notes = [*notes, "These runs have different test images, so their metrics do not compare."]
    groups, rows = group(runs), summarise(runs)
    sections = [headline(rows), *bought(runs), *over_training(groups, rows), *cost(rows), *transfer(groups)]
    more, of_models = _MODEL_SECTIONS.get(runs[0].task, ("", None))
    if images and of_models is not None:
        sections += of_models(groups, images, device)
    sections += [*published(groups), *settings(groups), making(runs, more="" if images else more)]
    links = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text, _ in sections)
    parts = [*map(paragraph, notes), f'<nav aria-label="Sections"><ul>{links}</ul></nav>']
    for name, text, body in sections:
        parts.append(f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(text)}</h2>{body}</section>')
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, document(title, parts))
    return out
