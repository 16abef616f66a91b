"""Rows of the page with their names, looks and contests, which all sections share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import mdistiller.report.markup as html
from mdistiller.report.answer import Contest, find_contests, shown_rows
from mdistiller.report.looks import Look, looks
from mdistiller.report.runs import Row, RunRecord, group, summarize
from mdistiller.types import Metric


@dataclass
class PageRows:
    """Rows of a page.

    groups: the runs of each row, by label.
    rows: their summaries, in the same order: those of each contest, the best first, then teachers.
    """

    groups: Mapping[str, Sequence[RunRecord]]
    rows: Sequence[Row]

    @classmethod
    def of(cls, runs: Sequence[RunRecord]) -> "PageRows":
        """Groups runs into rows."""
        groups, rows = group(runs), summarize(runs)
        ranked = [row for contest in find_contests(groups, rows) for row in contest.rows]
        rows = ranked + [row for row in rows if row not in ranked]
        return cls({row.label: groups[row.label] for row in rows}, rows)

    @property
    def metric(self) -> Metric:
        return next(iter(self.groups.values()))[0].main_metric

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Looks of the rows, by label."""
        return looks({row.label: row.method for row in self.rows})

    @cached_property
    def contests(self) -> list[Contest]:
        return find_contests(self.groups, self.rows)

    @cached_property
    def shown(self) -> list[str]:
        """Labels of the rows that charts with lines show first."""
        return shown_rows(self.contests, self.rows)

    @cached_property
    def pictured(self) -> list[str]:
        """Labels of the rows whose pictures are shown, which take more space than lines."""
        return shown_rows(self.contests, self.rows, 4)

    @cached_property
    def teachers(self) -> dict[str, float]:
        """Metric of each teacher by its name, where it is known."""
        return {name: value for contest in self.contests for name, value in contest.teachers.items()}

    def legend(self) -> str:
        """Returns the buttons that choose rows."""
        return html.legend(self.looks, self.shown)
