"""Sections of the report: those of classification."""

from mdistiller.report.sections import register_sections
from mdistiller.tasks.classification.report import SECTIONS

register_sections("multilabel", SECTIONS)
