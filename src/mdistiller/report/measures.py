"""Measures of the knowledge transfer: what a student and its teacher have in common on the test images."""

from typing import NamedTuple

from mdistiller.report.page_rows import PageRows
from mdistiller.report.sections import RunOutputs
from mdistiller.report.spread import MeanStd


class Measure(NamedTuple):
    """Heading, format, and explanation of a measure."""

    head: str
    spec: str
    note: str = ""


MEASURES = {
    "agreement": Measure("agreement, %", ".1f", "Agreement: images with the teacher's first class."),
    "nckd": Measure(
        "NCKD, nats", ".3f", "NCKD: the part of KD for the other classes, at temperature 4, times 16."
    ),
    "tckd": Measure("TCKD, nats", ".3f", "TCKD: the same for the target."),
    "ece": Measure("ECE, %", ".2f", "ECE: expected calibration error, 15 bins."),
    "correlation": Measure(
        "Δ correlation",
        ".3f",
        "Δ correlation: difference to the teacher in the correlation of two classes' logits.",
    ),
    "silhouette": Measure(
        "silhouette", ".3f", "Silhouette: mean silhouette coefficient of the classes in the pooled features."
    ),
    "knn": Measure(
        "10 nearest, %",
        ".1f",
        "10 nearest: accuracy of the 10 nearest images' vote. Both by cosine distance.",
    ),
}


def measured(rows: PageRows, found: RunOutputs | None = None) -> dict[str, dict[str, MeanStd]]:
    """Returns the known measures of each row by label, over its seeds.

    They are the diagnostics of the last epoch on the test images; what the diagnostics lack is computed from
    the models' outputs, where there are any. A student alone is compared with the teacher of the others.
    """
    known = {}
    for label, runs in rows.groups.items():
        computed = {} if found is None else found.measures(rows, label)
        seen = [run.evals[-1].seen() for run in runs]
        values = {
            name: [line[name] for line in seen if name in line] or computed.get(name, []) for name in MEASURES
        }
        known[label] = {name: MeanStd.of(each) for name, each in values.items() if each}
    return known
