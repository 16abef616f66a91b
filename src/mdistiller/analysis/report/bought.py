"""Section on accuracy beside cost, from the comparisons in the run folders."""

from collections.abc import Sequence
from html import escape

from mdistiller.analysis.compare import Comparison, read_comparison
from mdistiller.analysis.report.markup import Section, heads, html_table, paragraph
from mdistiller.analysis.runs import Run
from mdistiller.errors import DataError
from mdistiller.types import Metric


def compared_columns(found: Comparison, metric: Metric) -> list[list[str]]:
    """Returns a comparison as text, header first."""
    batches = list(found.rows[0].ms)
    header = ["model", metric.head(metric.name), "Δ alone", "parameters", "MACs, million", "MB"]
    lines = [[*header, *(f"ms, batch {batch}" for batch in batches)]]
    for row in found.rows:
        cells = [
            row.label,
            "–" if row.metric is None else format(row.metric, metric.spec),
            "–" if row.over_alone is None else metric.gain(row.over_alone),
            f"{row.parameters:,}",
            f"{row.macs / 1e6:,.1f}",
            "–" if row.bytes is None else f"{row.bytes / 1e6:,.2f}",
        ]
        lines.append([*cells, *(f"{row.ms[batch]:.3g}" for batch in batches)])
    return lines


def bought(runs: Sequence[Run]) -> list[Section]:
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
        rows = [
            [f'<th scope="row">{escape(first)}</th>', *(f"<td>{escape(text)}</td>" for text in rest)]
            for first, *rest in lines
        ]
        origin = "measured on these files in float32" if comparison.measured else "as the runs recorded it"
        note = (
            f"{metric.title}: {origin}. Δ alone: minus that of the student alone{points}. MACs: "
            "multiply-accumulates of convolutions and matrix products for one image. ms: median milliseconds "
            f"an image on {comparison.machine}."
        )
        parts += [html_table(heads(head), rows, "Table of accuracy and cost"), paragraph(note, "note")]
    parts += [paragraph(text) for text in failures]
    return [Section("bought", "What distillation bought", "".join(parts))] if parts else []
