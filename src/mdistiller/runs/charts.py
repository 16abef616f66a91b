"""The few charts of a run for loggers: metric, loss, transfer and speed."""

from collections.abc import Sequence
from typing import NamedTuple

from mdistiller.types import Line

_TRANSFER = ("agreement", "tckd", "nckd")
METRIC = "metric/"
"""Beginning of the names of the charts of the run's result."""


class Point(NamedTuple):
    """One value of a chart."""

    name: str
    step: int
    value: float


def points_of(line: Line, metrics: Sequence[str]) -> list[Point]:
    """Returns the values of a line of metrics.jsonl that have a chart, such as `loss/dkd`.

    Metrics are the names of an evaluation's, the one that picks the best epoch first. A value that is
    missing in the line, or no number, is left out.
    """
    first = metrics[0]
    found: dict[str, object] = {}
    if line["kind"] == "train":
        losses = {k: v for k, v in line.items() if k not in ("kind", "step", "epoch", "lr", "loss", *metrics)}
        found |= {f"{METRIC}{name}_train": line[name] for name in metrics if name != "loss" and name in line}
        found["loss/total"] = line.get("loss")
        if len(losses) > 1:  # the task's alone is the total
            found |= {f"loss/{name}": value for name, value in losses.items()}
        found["loss/learning_rate"] = line.get("lr")
    elif line["kind"] == "eval":
        found |= {f"{METRIC}{name}": line.get(name) for name in (first, f"best_{first}")}
        found[f"{METRIC}{first}_ema"] = _part(line, "ema").get(first)
        found["loss/test"] = line.get("loss")
        seen = _part(_part(line, "diagnostics"), "test")
        found |= {f"transfer/{name}": seen.get(name) for name in _TRANSFER}
        found["speed/ms_per_step"] = line.get("ms_per_step")
    step = line["step"]
    return [Point(name, step, value) for name, value in found.items() if isinstance(value, int | float)]


def _part(values: Line, name: str) -> Line:
    part = values.get(name)
    return part if isinstance(part, dict) else {}
