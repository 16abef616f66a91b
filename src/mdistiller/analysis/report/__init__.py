"""One self-contained HTML page about runs."""

from mdistiller.analysis.report.headline import table
from mdistiller.analysis.report.page import write_report

__all__ = ["table", "write_report"]
