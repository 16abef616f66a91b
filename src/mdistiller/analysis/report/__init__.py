"""One self-contained HTML page about runs."""

from mdistiller.analysis.report.page import write_report
from mdistiller.analysis.report.tables import table

__all__ = ["table", "write_report"]
