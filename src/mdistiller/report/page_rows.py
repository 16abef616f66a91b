"""Rows of the page with their names, looks and contests, which all sections share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import mdistiller.report.markup as html
from mdistiller.report.answer import Contest, find_contests, shown_rows
from mdistiller.report.looks import Look, looks, short_names
from mdistiller.report.runs import Row, RunRecord, group, summarise
from mdistiller.types import Metric


@dataclass
class PageRows:
    """Rows of a page.

    groups: the runs of each row, by label.
    rows: their summaries, in the same order.
    """

    groups: Mapping[str, Sequence[RunRecord]]
    rows: Sequence[Row]

    @classmethod
    def of(cls, runs: Sequence[RunRecord]) -> "PageRows":
        """Groups runs into rows."""
        return cls(group(runs), summarise(runs))

    @property
    def metric(self) -> Metric:
        return next(iter(self.groups.values()))[0].main_metric

    @cached_property
    def names(self) -> dict[str, str]:
        """Short names for readers, by label."""
        return short_names(self.groups)

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Looks of the rows, by label; those in a contest choose first."""
        listed = {row.label for contest in self.contests for row in contest.rows}
        found = looks(sorted(self.rows, key=lambda row: row.label not in listed))
        return {row.label: found[row.label] for row in self.rows}

    @cached_property
    def contests(self) -> list[Contest]:
        return find_contests(self.groups, self.rows)

    @cached_property
    def shown(self) -> list[str]:
        """Labels of the rows that charts with lines show first."""
        return shown_rows(self.contests, self.rows)

    @cached_property
    def teachers(self) -> dict[str, float]:
        """Metric of each teacher by its name, where it is known."""
        return {name: value for contest in self.contests for name, value in contest.teachers.items()}

    def legend(self) -> str:
        """Returns the buttons that choose rows."""
        return html.legend(self.looks, self.names, self.shown)
