"""The sentence of the first screen, the ranked chart and the measures, against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest

from mdistiller.methods import list_methods
from mdistiller.report.answer import answer, p_text
from mdistiller.report.looks import method_title
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import load_run
from mdistiller.report.tables import measured

stats = pytest.importorskip("scipy.stats")

VALUES = {"none": [80.0, 81.0, 82.5], "kd": [91.0, 92.4, 93.1], "dkd": [95.3, 96.1, 96.9]}


def teacher_at(top1: float, **values: float) -> list[dict]:
    return [{"test": {"teacher_top1": top1, **values}}]


@pytest.fixture
def rows_of(write_run):
    def read(values=VALUES, teacher=98.0, **fields) -> PageRows:
        folders = []
        for method, seeds in values.items():
            for seed, top1 in enumerate(seeds):
                known = None if method == "none" or teacher is None else teacher_at(teacher)
                folders.append(
                    write_run(
                        f"{method}-s{seed}", [top1], method=method, seed=seed, diagnostics=known, **fields
                    )
                )
        return PageRows.of([load_run(folder) for folder in folders])

    return read


def only_answer(rows: PageRows):
    (contest,) = rows.contests
    return answer(contest, rows.groups)


def test_the_sentence(rows_of):
    found = only_answer(rows_of())
    dkd, kd, alone = (np.array(VALUES[name]) for name in ("dkd", "kd", "none"))
    p = stats.ttest_ind(dkd, kd, equal_var=False).pvalue
    closed = 100 * (dkd.mean() - alone.mean()) / (98 - alone.mean())
    assert found.sentence == (
        f"DKD {dkd.mean():.1f} ± {dkd.std(ddof=1):.1f} %, {dkd.mean() - kd.mean():.1f} points above KD "
        f"(p = {p:.2g}, n = 3), closes {closed:.0f} % of the gap between student and teacher."
    )
    assert (found.best, found.against) == ("DKD", "KD")
    assert found.p == pytest.approx(p)
    assert found.closed == pytest.approx(closed)
    assert found.difference == pytest.approx(dkd.mean() - kd.mean())
    assert "Welch" in found.note
    assert "chance" not in found.note


def test_a_loss_names_its_usual_causes(rows_of):
    lost = only_answer(rows_of({"none": [80.0, 81.0], "kd": [60.0, 61.0]}))
    assert lost.note.endswith(
        "Usual causes: too few epochs, a weak teacher, or a distillation weight that is too high."
    )


def test_a_gain_names_no_causes(rows_of):
    won = only_answer(rows_of({"none": [60.0, 61.0], "kd": [80.0, 81.0]}))
    assert "Usual causes" not in won.note


def test_one_seed_says_so(rows_of):
    found = only_answer(rows_of({"none": [80.0], "kd": [91.0], "dkd": [95.0]}))
    assert found.sentence.startswith("DKD 95.0 %, 4.0 points above KD (n = 1, so no test), closes 83 %")
    assert found.p is None
    assert found.note == "One seed cannot show whether a difference is chance; three or more can."


def test_other_cases(rows_of, write_run):
    cases = {
        "against the student alone": (
            {"none": [80.0, 81.0], "dkd": [95.0, 96.0]},
            None,
            "DKD 95.5 ± 0.7 %, 15.0 points above the student alone (p = 0.0022, n = 2).",
        ),
        "worse than alone": (
            {"none": [80.0, 81.0], "dkd": [70.0, 71.0], "kd": [60.0, 61.0]},
            98.0,
            "Nothing beats the student alone (80.5 ± 0.7 %): the best method, DKD, reaches 70.5 ± 0.7 %, "
            "10.0 points below it (p = 0.005, n = 2).",
        ),
        "better than the teacher": (
            {"none": [80.0], "dkd": [95.0]},
            90.0,
            "DKD 95.0 %, 15.0 points above the student alone (n = 1, so no test) "
            "and passes its teacher (90.0 %).",
        ),
        "KD is best, by less than 0.1": (
            {"kd": [90.04, 90.06], "dkd": [90.0, 90.02], "at": [50.0, 51.0]},
            None,
            "KD 90.05 ± 0.01 %, 0.04 points above DKD (p = 0.11, n = 2).",
        ),
        "no spread": ({"kd": [90.0, 90.0], "dkd": [91.0, 91.0]}, None, "(n = 2, no spread, so no test)"),
        "unequal seeds": ({"kd": [90.0, 91.0], "dkd": [95.0, 96.0, 97.0]}, None, "n = 3 and 2)"),
        "nothing to compare": (
            {"dkd": [95.0]},
            98.0,
            "DKD 95.0 % (one seed), while its teacher reaches 98.0 %.",
        ),
        "no method": ({"none": [95.0, 96.0]}, None, "Student alone 95.5 ± 0.7 %."),
    }
    for name, (values, teacher, expected) in cases.items():
        folders = []
        for method, seeds in values.items():
            for seed, top1 in enumerate(seeds):
                known = None if method == "none" or teacher is None else teacher_at(teacher)
                run = f"{name}-{method}-{seed}".replace(" ", "-")
                folders.append(write_run(run, [top1], method=method, seed=seed, diagnostics=known))
        found = only_answer(PageRows.of([load_run(folder) for folder in folders]))
        sentence = found.sentence.replace("Resnet8 alone", "Student alone")
        assert expected in sentence, (name, sentence)
        if expected.endswith("."):
            assert sentence == expected, name


def test_the_sentence_is_about_finished_runs_of_one_teacher(write_run):
    def rows(*, finished: bool) -> PageRows:
        where = "done" if finished else "open"
        folders = [write_run(f"{where}-alone", [60.0], method="none")]
        for teacher, method, top1, ended in (
            *(("resnet20", "dkd", 80.0, finished), ("resnet20", "at", 75.0, finished)),
            *(("resnet14", "kd", 79.0, finished), ("resnet20", "crd", 95.0, False)),
        ):
            name = f"{where}-{method}-{teacher}"
            folders.append(write_run(name, [top1], method=method, teacher={"name": teacher}, finished=ended))
        return PageRows.of([load_run(folder) for folder in folders])

    done = only_answer(rows(finished=True))
    # KD has another teacher, and CRD has not finished.
    assert done.sentence == "DKD from resnet20 80.0 %, 5.0 points above AT from resnet20 (n = 1, so no test)."
    assert done.note.endswith("1 run under way.")
    under_way = only_answer(rows(finished=False))
    assert under_way.sentence == "CRD from resnet20 is at 95.0 % so far; no method has finished."
    assert (under_way.against, under_way.p, under_way.closed) == (None, None, None)


def test_the_teachers_metric_from_its_run(write_run, tmp_path):
    """Without diagnostics; that run is in no contest."""
    folders = [
        write_run("teacher", [97.0], method="none", student={"name": "resnet20"}),
        write_run("alone", [80.0], method="none"),
        write_run("d", [90.0], teacher={"name": "resnet20", "checkpoint": str(tmp_path / "teacher")}),
    ]
    rows = PageRows.of([load_run(folder) for folder in folders])
    (contest,) = rows.contests
    assert contest.teachers == {"teacher": 97.0}
    assert [row.label for row in contest.rows] == ["DKD", "student alone"]
    assert answer(contest, rows.groups).closed == pytest.approx(100 * 10 / 17)
    assert [row.label for row in rows.rows] == ["DKD", "student alone", "teacher"]


def test_each_student_has_its_contest(write_run):
    folders = [
        write_run("a", [50.0]),
        write_run("b", [60.0], student={"name": "resnet14"}),
        write_run("c", [55.0], method="none"),
    ]
    rows = PageRows.of([load_run(folder) for folder in folders])
    assert [(c.student, len(c.rows)) for c in rows.contests] == [("resnet8", 2), ("resnet14", 1)]
    assert [row.label for row in rows.rows] == ["resnet8 alone", "DKD into resnet8", "DKD into resnet14"]


def test_many_methods_and_an_open_choice(rows_of):
    rows = rows_of(
        {"none": [80.0, 81.0], **{m: [90.0 + i, 91.0 + i] for i, m in enumerate(("at", "crd", "kd"))}}
    )
    assert "not corrected for the choice of the best of 3" in only_answer(rows).note


def test_a_difference_that_may_be_chance(rows_of):
    near = rows_of({"kd": [90.0, 92.0], "dkd": [91.0, 92.5]}, teacher=None)
    assert only_answer(near).note.startswith("The difference may be chance.")


def test_p_in_words():
    assert [p_text(p) for p in (0.5, 0.0123, 0.0004)] == ["p = 0.5", "p = 0.012", "p < 0.001"]


def test_at_most_eight_rows_are_shown_first(rows_of):
    methods = [m for m in list_methods() if m not in ("none", "kd", "dkd")][:15]
    values = {m: [60.0 + i] for i, m in enumerate(methods)} | {"none": [50.0], "kd": [51.0], "dkd": [52.0]}
    rows = rows_of(values, teacher=None)
    shown = set(rows.shown)
    best = {method_title(m) for m in methods[-5:]}
    assert shown == {"student alone", "KD", "DKD", *best}


def test_a_method_has_its_color_on_every_page(rows_of, write_run):
    one = rows_of({"kd": [1.0], "crd": [2.0], "dkd": [3.0]}, teacher=None)
    colors = {row.method: look.color for row, look in zip(one.rows, one.looks.values(), strict=True)}
    folders = [write_run("x", [5.0], method="dkd"), write_run("y", [6.0], method="dkd", epochs=9)]
    folders += [write_run("z", [7.0], method="crd")]
    other = PageRows.of([load_run(folder) for folder in folders])
    found = [(row.method, look) for row, look in zip(other.rows, other.looks.values(), strict=True)]
    assert all(look.color == colors[method] for method, look in found)
    assert len({(look.color, look.shape) for _, look in found}) == 3
    assert len({(look.color, look.dash) for _, look in found}) == 3


def test_the_measures_of_the_transfer(write_run):
    def known(agreement, nckd):
        return [
            {"test": {"agreement": agreement, "nckd": nckd, "tckd": 0.1, "ece": 2.0, "teacher_top1": 98.0}}
        ]

    folders = [
        write_run("n", [80.0], method="none", diagnostics=[{"test": {"ece": 7.0}}]),
        write_run("d0", [96.0], diagnostics=known(90.0, 0.4)),
        write_run("d1", [97.0], seed=1, diagnostics=known(94.0, 0.5)),
    ]
    rows = PageRows.of([load_run(folder) for folder in folders])
    found = measured(rows)
    dkd = found["DKD"]
    assert (dkd["agreement"].mean, dkd["agreement"].std) == (92.0, pytest.approx(np.std([90, 94], ddof=1)))
    assert (dkd["nckd"].mean, dkd["ece"].mean) == (pytest.approx(0.45), 2.0)
    assert set(found["student alone"]) == {"ece"}


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("dkd", "DKD"),
        ("reviewkd", "ReviewKD"),
        ("lskd-reviewkd+fitnet", "LSKD-ReviewKD+FitNet"),
        ("mine", "MINE"),
        ("my_method", "my_method"),
    ],
)
def test_titles_of_methods(name, title):
    assert method_title(name) == title


def test_a_title_is_the_name_in_other_letters():
    for name in set(list_methods()) - {"none"}:
        assert method_title(name).lower() == name.replace("_", "")
