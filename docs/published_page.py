"""Sections of published runs, which the site adds to the pages of methods."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from mdistiller.recipes.describe import figure_text, method_lines
from mdistiller.recipes.published import PublishedRun, Values, all_runs, find_reproduced

_TITLES = {
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet",
    "tiny-imagenet": "Tiny-ImageNet",
    "coco": "COCO",
}
_INTRODUCTION = "[How to read the columns](published.md)."


def page_of(method: str) -> str:
    """Returns the method whose page has a method's published runs: the first one of a combination."""
    return re.split("[-+]", method)[0]


def published_sections() -> dict[str, str]:
    """Returns the Markdown of the published runs by method page, with a table for each source."""
    groups: dict[str, list[list[PublishedRun]]] = {}
    for data in _TITLES:
        for _, runs in groupby(
            all_runs(data), lambda run: (run.method, run.optimizer, run.source)
        ):
            found = list(runs)
            groups.setdefault(found[0].method, []).append(found)
    pages: dict[str, list[str]] = {}
    for method in sorted(groups, key=lambda name: (page_of(name), name)):
        parts = pages.setdefault(page_of(method), ["## Published runs", _INTRODUCTION])
        parts += [f"### {method}"] if method != page_of(method) else []
        parts += ["\n".join(_table(runs)) for runs in groups[method]]
        pairs = dict.fromkeys(
            (run.data, run.pair) for runs in groups[method] for run in runs
        )
        parts += (
            ["\n".join(_reproduced(method, pairs))]
            if any(_reproduced(method, pairs))
            else []
        )
    return {page: "\n\n".join(parts) + "\n" for page, parts in pages.items()}


def _reproduced(method: str, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lists the runs in which others repeated those of a method."""
    lines = [
        f"- {_TITLES[data]}, {pair}: {reproduced_text(run)}"
        for data, pair in pairs
        for run in find_reproduced(data, method, pair)
    ]
    yield from ["Reproduced elsewhere, in percent top-1:", "", *lines] if lines else []


def reproduced_text(run: Values) -> str:
    """Returns the figures of a run by others, its source and what is known about it, in one line."""
    top1 = " to ".join(f"{value:.2f}" for value in run.top1)
    last = "" if run.log is None else f"{run.log[0]:.2f} last, "
    known = [f"teacher {run.teacher:g} %"] if run.teacher is not None else []
    known += [run.note] if run.note else []
    epoch = f" {run.epoch}" if run.epoch != "unstated" else ""
    return f"{last}{top1}{epoch}, {run.source}" + (
        f" ({'; '.join(known)})" if known else ""
    )


def _table(runs: list[PublishedRun]) -> Iterator[str]:
    first = runs[0]
    texts = [f"{_TITLES[first.data]}. Settings: {first.source}."]
    figures = list(dict.fromkeys(run.figures or run.source for run in runs if run.top1))
    texts += [f"Figures: {'; '.join(figures)}."] if figures else []
    texts += (
        [] if first.optimizer == "sgd" else [f"With the optimizer `{first.optimizer}`."]
    )
    texts += dict.fromkeys(run.note for run in runs if run.note)
    yield " ".join(texts)
    yield ""
    yield "| pair | top-1 | log | rate | batch | epochs | drops | method |"
    yield "| --- | --- | --- | ---: | ---: | ---: | --- | --- |"
    for run in runs:
        log = "" if run.log is None else f"{run.log[0]:.2f}, {run.log[1]:.2f}"
        more = [
            *(["Nesterov"] if run.nesterov else []),
            *(f"`{line}`" for line in method_lines(run.fields, "")),
        ]
        more += [] if run.warmup is None else [f"warm-up {run.warmup}"]
        more += (
            []
            if run.deltas is None
            else [f"deltas {' '.join(f'{delta:g}' for delta in run.deltas)}"]
        )
        more += (
            [] if run.clip_norm is None else [f"gradient clipped at {run.clip_norm:g}"]
        )
        drops = (
            ", ".join(map(str, run.drops))
            or f"{run.schedule} to {run.min_lr:g}, rises {run.lr_warmup}"
        )
        cells = (
            *(run.pair, figure_text(run), log, f"{run.lr:g}", str(run.batch_size)),
            *(str(run.epochs or run.steps), drops, ", ".join(more)),
        )
        yield "| " + " | ".join(cells) + " |"
