"""One self-contained HTML page over runs."""

from mdistiller.analysis.report.headline import table
from mdistiller.analysis.report.page import write_report
from mdistiller.analysis.report.style import STYLE

__all__ = ["STYLE", "table", "write_report"]
