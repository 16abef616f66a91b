"""Sections of the report on a detector's classes, errors and boxes."""

from mdistiller.report.sections import TaskSections, register_sections
from mdistiller.tasks.detection.report.boxes import boxes as draw_boxes

register_sections("detection", TaskSections("AP by class, kinds of errors and boxes", draw_boxes))
