"""Section on accuracy beside cost, from the comparisons in the run folders."""

from collections.abc import Sequence

from mdistiller.analysis.compare import Comparison, read_comparison
from mdistiller.analysis.report.markup import Section, metric_names, paragraph, text_table, value_text
from mdistiller.analysis.runs import Run
from mdistiller.errors import DataError


def compared_columns(found: Comparison) -> list[list[str]]:
    """Returns a comparison as text, header first."""
    batches = list(found.rows[0].ms)
    header = ["model", f"{found.metric}, %", "Δ alone", "parameters", "MACs, million", "MB"]
    lines = [[*header, *(f"ms, batch {batch}" for batch in batches)]]
    for row in found.rows:
        cells = [
            row.label,
            value_text(row.metric, ".2f"),
            value_text(row.over_alone, "+.2f"),
            f"{row.parameters:,}",
            f"{row.macs / 1e6:,.1f}",
            value_text(None if row.bytes is None else row.bytes / 1e6, ",.2f"),
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
    parts = []
    for comparison in found.values():
        head, *lines = compared_columns(comparison)
        origin = "measured on these files in float32" if comparison.measured else "as the runs recorded it"
        note = (
            f"{metric_names(comparison.metric).title}: {origin}. Δ alone: minus that of the student alone, "
            "in percentage points. MACs: multiply-accumulates of convolutions and matrix products for one "
            f"image. ms: median milliseconds an image on {comparison.machine}."
        )
        parts += [text_table(head, lines, "Table of accuracy and cost"), paragraph(note, "note")]
    parts += [paragraph(text) for text in failures]
    return [Section("bought", "What distillation bought", "".join(parts))] if parts else []
