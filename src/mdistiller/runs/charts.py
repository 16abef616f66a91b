"""The few charts of a run for loggers: metric, loss, transfer and speed, without constant values."""

from collections.abc import Iterable, Sequence
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


class Charts:
    """Points of a run's charts, from the lines of its metrics.jsonl.

    A chart appears with its second value: points that are all equal are held back. The metrics, which are
    the run's result, and a chart with a single point at the run's end appear in any case.

    Args:
        metrics: names of an evaluation's metrics, the one that picks the best epoch first.
        lines: earlier lines of the run, whose points have been written.
    """

    def __init__(self, metrics: Sequence[str], lines: Iterable[Line] = ()) -> None:
        self.metrics = metrics
        self.held: dict[str, list[Point]] = {}
        self.shown: set[str] = set()
        for line in lines:
            self.points(line)

    def points(self, line: Line) -> list[Point]:
        """Returns the points to write after a line."""
        if line["kind"] == "summary":
            return [point for points in self.held.values() if len(points) == 1 for point in points]
        found = []
        for name, value in values_of(line, self.metrics).items():
            point = Point(name, line["step"], value)
            if name in self.shown or name.startswith(METRIC):
                found.append(point)
                continue
            held = self.held.setdefault(name, [])
            held.append(point)
            if value != held[0].value:
                self.shown.add(name)
                found += self.held.pop(name)
        return found


def values_of(line: Line, metrics: Sequence[str]) -> dict[str, float]:
    """Returns the values of a line that have a chart, by the chart's name, such as `loss/dkd`.

    A value that is missing in the line, or no number, is left out: the file may be damaged.
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
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _part(values: Line, name: str) -> Line:
    part = values.get(name)
    return part if isinstance(part, dict) else {}
