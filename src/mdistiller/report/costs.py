"""Section on accuracy beside cost, from the comparisons in the run folders."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from mdistiller.errors import DataError
from mdistiller.report.markup import Section, paragraph, text_table, value_text
from mdistiller.report.runs import RunRecord
from mdistiller.runs.environment import Machine
from mdistiller.settings import explain
from mdistiller.types import Metric

COMPARISON = "compare.json"


class ComparedModel(BaseModel, frozen=True):
    """A row of a comparison."""

    label: str
    metric: float | None
    """On the test set; None where it is not known."""
    over_alone: float | None
    """Metric minus that of the student alone; None without one, and for it."""
    parameters: int
    macs: int
    """Multiply-accumulates for one image."""
    bytes: int | None
    """Size of the file; None for a model without one, such as a pretrained teacher."""
    ms: dict[int, float]
    """Median milliseconds an image, by batch size."""


class Comparison(BaseModel, frozen=True):
    """Models compared on one machine: `compare.json` in a run folder."""

    test_set: str
    metric: str
    measured: bool
    """Whether the metrics were computed for the comparison; otherwise they are the recorded ones."""
    machine: Machine
    image_shape: tuple[int, ...] | None = None
    """Shape of the prepared images, with a batch's axis unless a model takes a single one."""
    rows: list[ComparedModel]


def read_comparison(folder: Path) -> Comparison | None:
    """Reads the comparison in a run folder; None without one.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / COMPARISON
    try:
        return Comparison.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(str(explain(error, str(path)))) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def compared_columns(found: Comparison, metric: Metric) -> list[list[str]]:
    """Returns a comparison as text, header first."""
    batches = list(found.rows[0].ms)
    header = ["model", metric.head(metric.name), "Δ alone", "parameters", "MACs, million", "MB"]
    lines = [[*header, *(f"ms, batch {batch}" for batch in batches)]]
    for row in found.rows:
        cells = [
            row.label,
            value_text(row.metric, metric.spec),
            "–" if row.over_alone is None else metric.gain(row.over_alone),
            f"{row.parameters:,}",
            f"{row.macs / 1e6:,.1f}",
            value_text(None if row.bytes is None else row.bytes / 1e6, ",.2f"),
        ]
        lines.append([*cells, *(f"{row.ms[batch]:.3g}" for batch in batches)])
    return lines


def costs(runs: Sequence[RunRecord]) -> list[Section]:
    """Returns a table for each comparison in the run folders; several folders may hold the same one."""
    found: dict[str, Comparison] = {}
    failures = []
    for run in runs:
        try:
            comparison = read_comparison(run.path)
        except DataError as error:
            failures.append(str(error))
            continue
        if comparison is not None:
            found.setdefault(comparison.model_dump_json(), comparison)
    parts, metric = [], runs[0].main_metric
    points = ", in percentage points" if metric.unit else ""
    for comparison in found.values():
        head, *lines = compared_columns(comparison, metric)
        size = comparison.image_shape
        shape = f", images of shape {list(size)}" if size else ""
        origin = "measured on these files in float32" if comparison.measured else "as the runs recorded it"
        note = (
            f"{metric.title}: {origin}. Δ alone: minus that of the student alone{points}. MACs: "
            "multiply-accumulates of convolutions and matrix products for one image. ms: median milliseconds "
            f"an image on {comparison.machine}{shape}."
        )
        parts += [text_table(head, lines, "Table of accuracy and cost"), paragraph(note, "note")]
    parts += [paragraph(text) for text in failures]
    return [Section("cost", "Cost and accuracy", "".join(parts))] if parts else []
