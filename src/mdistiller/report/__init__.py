"""Report about runs: one self-contained HTML page, or its tables in other formats."""

from mdistiller.report.page import FORMATS, file_name, report_text, try_report, write_report
from mdistiller.report.tables import table

__all__ = ["FORMATS", "file_name", "report_text", "table", "try_report", "write_report"]
