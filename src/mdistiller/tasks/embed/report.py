"""Sections of the report: none of its own."""

from mdistiller.report.sections import TaskSections, register_sections

register_sections("embed", TaskSections())
