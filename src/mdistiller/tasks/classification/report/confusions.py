"""Section on the commonest confusions, with their images."""

from collections import Counter
from collections.abc import Sequence
from html import escape

import mdistiller.report.markup as html
from mdistiller.report.page_rows import PageRows
from mdistiller.tasks.classification.report.outputs import ClassifierOutputs

PAIRS, PICTURES = 6, 5  # confusions, and images of each
_SIDE = 64  # largest size of a picture in pixels


def errors_of(found: ClassifierOutputs, label: str) -> dict[tuple[int, int], Counter[int]]:
    """Counts a row's errors by (true class, predicted class) and image, over its seeds."""
    errors: dict[tuple[int, int], Counter[int]] = {}
    for outputs in found.students[label]:
        predicted = outputs.logits.argmax(1)
        for i in (predicted != outputs.label).nonzero()[:, 0].tolist():
            pair = (int(outputs.label[i]), int(predicted[i]))
            errors.setdefault(pair, Counter())[int(outputs.index[i])] += 1
    return errors


def confusions(found: ClassifierOutputs, rows: PageRows) -> list[html.Section]:
    """Returns the commonest confusions of the rows shown first, their images, and their counts by row."""
    if found.splits is None or not found.students or found.is_multi_label:
        return []
    classes = found.splits.classes
    columns = [label for label in rows.shown if label in found.students]
    of_row = {label: errors_of(found, label) for label in columns}
    seeds = {label: len(found.students[label]) for label in columns}
    mean: Counter[tuple[int, int]] = Counter()
    for label, errors in of_row.items():
        for pair, images in errors.items():
            mean[pair] += images.total() / seeds[label]  # type: ignore[assignment]
    pairs = sorted(mean, key=lambda pair: (-mean[pair], pair))[:PAIRS]
    if not pairs:
        body = html.paragraph(f"No errors on {found.images:,} test images.")
        return [html.Section("confusions", "Commonest confusions", body)]
    totals = next(iter(found.students.values()))[0].label.bincount(minlength=len(classes))
    cells, most = [], max(of_row[c].get(p, Counter()).total() / seeds[c] for p in pairs for c in columns)
    for pair in pairs:
        true, predicted = (classes[k] for k in pair)
        total = f"<br><small>of {int(totals[pair[0]])}</small>"
        first = f'<th scope="row">{escape(true)} → {escape(predicted)}{total}</th>'
        counts = [of_row[label].get(pair, Counter()).total() / seeds[label] for label in columns]
        shades = [
            f'<td style="--s:{count / (most or 1):.2f}" class="shade loss">{count:.3g}</td>'
            for count in counts
        ]
        cells.append([first, f"<td>{_pictures(found, pair, list(of_row.values()))}</td>", *shades])
    head = html.heads(("true → predicted", "images", *(rows.names[label] for label in columns)))
    table = html.html_table(head, cells, "Table of confusions", "confusions", name="confusions-table")
    note = (
        f"The {len(pairs)} commonest errors of these rows on {found.images:,} test images: how many images "
        "of the true class each row takes for the other (mean over seeds). Images with the error in most "
        "runs come first."
    )
    return [html.Section("confusions", "Commonest confusions", table + html.paragraph(note, "note"))]


def _pictures(
    found: ClassifierOutputs, pair: tuple[int, int], rows: Sequence[dict[tuple[int, int], Counter[int]]]
) -> str:
    images: Counter[int] = Counter()
    for errors in rows:
        images += errors.get(pair, Counter())
    assert found.splits is not None
    true, predicted = (found.splits.classes[k] for k in pair)
    order = sorted(images, key=lambda index: (-images[index], index))
    return "".join(
        f'<img src="{html.image_uri(found.image(index), _SIDE, "smaller")}" width="56" height="56" '
        f'alt="{escape(f"{true}, predicted as {predicted} (test image {index})")}">'
        for index in order[:PICTURES]
    )
