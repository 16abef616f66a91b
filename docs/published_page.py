"""Page of all published runs: `python docs/published_page.py` writes docs/methods/published.md."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from mdistiller.recipes.describe import figure_text, method_lines, reproduced_text
from mdistiller.recipes.published import PublishedRun, all_runs, find_reproduced

_TITLES = {
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet",
    "tiny-imagenet": "Tiny-ImageNet",
    "coco": "COCO",
}
_INTRODUCTION = """\
# Published runs

Written by `python docs/published_page.py` from the files in `src/mdistiller/recipes/published/`, which
the recipes read. `mdistiller show RECIPE` prints one run with its origin and the recipe's values.

- Top-1 in percent, of the last epoch or of the best one on the test set. RepDistiller and ITRD report the
  last epoch; the code bases of DKD and LSKD report the best, which is 0.3 points more on average over 40 of
  LSKD's logs. With several numbers in a source, their mean.
- `log`: last and best epoch of the authors' log of one run.
- "default settings": the authors' hyper-parameters are not known here. "unverified": noted from memory.
- Drops: the learning rate is divided by 10 after these epochs (steps on COCO); or the schedule, its lowest
  rate and the epochs over which the rate first rises.
- "Reproduced elsewhere": others repeated a run, with the authors' code or with their own.
- The first table of a method and data set has the recipes' values."""


def published_page() -> str:
    """Returns the page as Markdown: for each method, a table for each of its sources."""
    groups: dict[str, list[list[PublishedRun]]] = {}
    for data in _TITLES:
        for _, runs in groupby(all_runs(data), lambda run: (run.method, run.optimizer, run.source)):
            found = list(runs)
            groups.setdefault(found[0].method, []).append(found)
    parts = [_INTRODUCTION]
    for method in sorted(groups):
        parts.append(f"## {method}")
        parts += ["\n".join(_table(runs)) for runs in groups[method]]
        pairs = dict.fromkeys((run.data, run.pair) for runs in groups[method] for run in runs)
        parts += ["\n".join(_reproduced(method, pairs))] if any(_reproduced(method, pairs)) else []
    return "\n\n".join(parts) + "\n"


def _reproduced(method: str, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lists the runs in which others repeated those of a method."""
    lines = [
        f"- {_TITLES[data]}, {pair}: {reproduced_text(run)}"
        for data, pair in pairs
        for run in find_reproduced(data, method, pair)
    ]
    yield from ["Reproduced elsewhere, in percent top-1:", "", *lines] if lines else []


def _table(runs: list[PublishedRun]) -> Iterator[str]:
    first = runs[0]
    texts = [f"{_TITLES[first.data]}. Settings: {first.source}."]
    figures = list(dict.fromkeys(run.figures or run.source for run in runs if run.top1))
    texts += [f"Figures: {'; '.join(figures)}."] if figures else []
    texts += [] if first.optimizer == "sgd" else [f"With the optimizer `{first.optimizer}`."]
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
        more += [] if run.deltas is None else [f"deltas {' '.join(f'{delta:g}' for delta in run.deltas)}"]
        more += [] if run.clip_norm is None else [f"gradient clipped at {run.clip_norm:g}"]
        drops = ", ".join(map(str, run.drops)) or f"{run.schedule} to {run.min_lr:g}, rises {run.lr_warmup}"
        cells = (
            *(run.pair, figure_text(run), log, f"{run.lr:g}", str(run.batch_size)),
            *(str(run.epochs or run.steps), drops, ", ".join(more)),
        )
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    page = Path(__file__).parent / "methods" / "published.md"
    page.write_text(published_page(), encoding="utf-8")
