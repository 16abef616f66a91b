"""Sections of the report on classes and correlations."""

from mdistiller.report.markup import Section
from mdistiller.report.page_rows import PageRows
from mdistiller.report.sections import RunOutputs, TaskSections, register_sections
from mdistiller.tasks.classification.report.correlation import correlations
from mdistiller.tasks.classification.report.gains import gains
from mdistiller.tasks.classification.report.outputs import ClassifierOutputs, run_models


def of_classes(rows: PageRows, images: int, device: str, found: RunOutputs | None) -> list[Section]:
    """Returns the sections that read the outputs of classifiers."""
    assert isinstance(found, ClassifierOutputs)
    return [part for make in (gains, correlations) for part in make(found, rows)]


SECTIONS = TaskSections("classes and correlations", of_classes, run_models)
register_sections("classification", SECTIONS)
