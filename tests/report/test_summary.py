"""Reading run folders, and their mean and spread over seeds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mdistiller.errors import DataError
from mdistiller.report import table, write_report
from mdistiller.report.runs import group, load_run, summarize
from mdistiller.report.spread import MeanStd
from mdistiller.types import Metric

TOP1 = Metric("top1", "%")
SEEDS = {0: [40.0, 71.25, 70.5], 1: [35.5, 60.0, 68.125], 2: [50.0, 73.0, 72.75]}


def test_summary_is_numpys_mean_and_sample_deviation(write_run):
    runs = [
        load_run(write_run(f"s{seed}", top1s, seed=seed, ms=10.0 + seed, seconds=3.0 + seed))
        for seed, top1s in SEEDS.items()
    ]
    (row,) = summarize(runs)
    last, best = ([f(top1s) for top1s in SEEDS.values()] for f in (lambda x: x[-1], max))
    assert row.last.mean == pytest.approx(np.mean(last), rel=1e-12)
    assert row.last.std == pytest.approx(np.std(last, ddof=1), rel=1e-12)
    assert row.best.mean == pytest.approx(np.mean(best), rel=1e-12)
    assert row.best.std == pytest.approx(np.std(best, ddof=1), rel=1e-12)
    assert row.seconds == pytest.approx(4.0)
    assert row.ms_per_step == pytest.approx(11.0)
    assert (row.label, row.seeds, row.student_parameters) == ("DKD", 3, 78042)
    assert row.finished


def test_one_seed_has_no_deviation(write_run):
    (row,) = summarize([load_run(write_run("a", [50.0, 60.0]))])
    assert row.last == row.best == MeanStd(60.0, None)
    assert str(row.last) == "60.00"
    assert str(MeanStd(60.0, 1.256)) == "60.00 ± 1.26"


def test_labels_and_order(write_run):
    runs = [
        write_run("k1", [50.0], method="kd", seed=1),
        write_run("d0", [50.0], method="dkd"),
        write_run("n0", [50.0], method="none"),
        write_run("k0", [52.0], method="kd"),
    ]
    rows = summarize([load_run(run) for run in runs])
    assert [(row.label, row.seeds) for row in rows] == [*(("KD", 2), ("DKD", 1), ("student alone", 1))]


LABEL = "DKD"


def names(folders):
    groups = group([load_run(folder) for folder in folders])
    return {name: [run.path.name for run in runs] for name, runs in groups.items()}


def test_runs_of_other_settings_are_told_apart_by_them(write_run):
    folders = [
        write_run("a0", [50.0]),
        write_run("b0", [60.0], epochs=3),
        write_run("a1", [52.0], seed=1),
        write_run("b1", [62.0], epochs=3, seed=1),
        write_run("k", [62.0], method="kd"),
    ]
    found = names(folders)
    first, second, third = found
    assert (first.rpartition(" ")[0], second) == (f"{LABEL}, epochs", f"{LABEL}, epochs 3")
    assert list(found.values()) == [["a0", "a1"], ["b0", "b1"], ["k"]]
    assert third == "KD"
    rows = summarize([load_run(folder) for folder in folders])
    assert [row.last.mean for row in rows] == [51.0, 61.0, 62.0]
    assert rows[0].folders == [str(folders[0]), str(folders[2])]


def test_many_differences_are_a_number(write_run):
    other = {"epochs": 3, "batch_size": 7, "precision": "bfloat16", "eval_every": 3}
    assert list(names([write_run("a", [50.0]), write_run("b", [60.0], **other)])) == [LABEL, f"{LABEL} (2)"]


def test_a_teachers_own_run_is_called_so(write_run, tmp_path):
    big = {"method": "none", "student": {"name": "resnet20"}}
    folders = [write_run("big", [70.0], **big), write_run("small", [50.0], method="none")]
    assert list(names(folders)) == ["resnet20 alone", "resnet8 alone"]
    assert list(names([write_run("recipe", [70.0], recipe="digits.teacher.resnet20", **big)])) == ["teacher"]
    alone = ["student alone"]
    for number, checkpoint in enumerate((folders[0], folders[0] / "student.safetensors")):
        teacher = {"name": "resnet20", "checkpoint": str(checkpoint)}
        taught = write_run(f"dkd{number}", [60.0], teacher=teacher)
        assert list(names([*folders, taught])) == ["teacher", *alone, LABEL]
    # The second of two teachers, and a teacher of the student's own architecture: the student alone.
    more = [{"name": "resnet20", "checkpoint": str(folders[0])}]
    small = {"name": "resnet8", "checkpoint": str(folders[1])}
    taught = write_run("two", [60.0], teacher=small, more_teachers=more)
    found = summarize([load_run(folder) for folder in (*folders, taught)])
    assert [row.label for row in found] == ["teacher", *alone, "DKD"]
    assert found[2].over_baseline == 10.0


def test_a_teachers_folder_that_was_copied_is_the_teacher(write_run, tmp_path):
    """Its config says where it was trained, and the student's config names that folder."""
    trained = write_run("big", [70.0], method="none", student={"name": "resnet20"})
    copied = shutil.copytree(trained, tmp_path / "elsewhere" / "other-name")
    taught = write_run("dkd", [60.0], teacher={"name": "resnet20", "checkpoint": str(trained)})
    shutil.rmtree(trained)
    assert list(names([copied, write_run("small", [50.0], method="none"), taught])) == [
        *("teacher", "student alone", "DKD")
    ]


def test_teachers_are_named_where_there_are_several(write_run, tmp_path):
    folders = []
    for model, name in (("resnet20", "one"), ("resnet14", "two"), ("resnet14", "three")):
        folders.append(write_run(name, [70.0], method="none", student={"name": model}))
        teacher = {"name": model, "checkpoint": str(folders[-1])}
        folders.append(write_run(f"dkd-{name}", [60.0], teacher=teacher))
    assert list(names(folders)) == [
        *("teacher resnet20", "DKD from resnet20", "teacher resnet14 two", "DKD from resnet14 two"),
        *("teacher resnet14 three", "DKD from resnet14 three"),
    ]
    other = write_run("other", [60.0], student={"name": "vgg8"})
    assert list(names([folders[1], other])) == [
        "DKD from resnet20 one into resnet8",
        "DKD from resnet20 into vgg8",
    ]


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({"kind": "cifar100"}, "cifar100"),
        ({"kind": "folder", "root": "somewhere/birds"}, "birds"),
        ({"kind": "digits", "test_limit": 50}, "digits, 50 test images"),
    ],
)
def test_runs_with_other_test_images_say_so(write_run, tmp_path, data, shown):
    folders = [write_run("a", [50.0], data={"kind": "digits"}), write_run("b", [60.0], data=data)]
    assert list(names(folders)) == [f"{LABEL} on digits", f"{LABEL} on {shown}"]
    page = write_report(folders, tmp_path / "report.html").read_text()
    assert f"digits and {shown}: 2 runs" in page
    assert "so their metrics do not compare" in page
    page = write_report(folders[:1], tmp_path / "report.html").read_text()
    assert "so their metrics do not compare" not in page


def test_wrong_labels_and_fewer_images_to_learn_from_are_no_other_test(write_run):
    folders = [
        write_run("a", [50.0], method="none", data={"kind": "digits", "label_noise": 0.4}),
        write_run("b", [60.0], data={"kind": "digits", "train_limit": 9}),
    ]
    assert list(names(folders)) == ["student alone", LABEL]


def test_normalization_makes_no_other_baseline(write_run):
    """A student takes the mean of its teacher's weights; the student alone has the recipe's."""
    folders = [
        write_run("a", [50.0], method="none", data={"kind": "digits", "mean": [0.5] * 3}),
        write_run("b", [60.0], data={"kind": "digits", "mean": [0.485, 0.456, 0.406]}),
    ]
    rows = summarize([load_run(path) for path in folders])
    assert [row.over_baseline for row in rows] == [None, 10.0]


def test_a_run_under_way(write_run):
    path = write_run("a", [50.0, 60.0, 55.0], finished=False, ms=10.0)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval", "epoch": 4, "top')
    run = load_run(path)
    assert run.summary is None
    assert [line.value for line in run.evals] == [50.0, 60.0, 55.0]
    assert len(run.windows) == 3
    (row,) = summarize([run])
    assert (row.finished, row.student_parameters) == (False, None)
    assert (row.last.mean, row.best.mean, row.ms_per_step) == (55.0, 60.0, 20.0)
    head, cells = table([row], TOP1)
    assert cells[0] == "DKD (under way)"
    assert cells[-1] == "–"
    assert len(head) == len(cells)


def test_a_row_is_of_its_finished_runs(write_run):
    runs = [write_run("a", [50.0]), write_run("b", [60.0], seed=1, finished=False)]
    (row,) = summarize([load_run(run) for run in runs])
    assert (row.finished, row.seeds, row.values) == (True, 1, (50.0,))
    assert row.student_parameters == 78042


def test_table(write_run):
    runs = [load_run(write_run(f"s{seed}", top1s, seed=seed)) for seed, top1s in SEEDS.items()]
    head, cells = table(summarize(runs), TOP1)
    assert head == [
        *("run", "seeds", "last, %", "best, %", "Δ baseline", "Δ teacher", "seconds", "ms/step"),
        *("parameters", "extra"),
    ]
    assert cells == [
        *(
            "DKD",
            "3",
            "70.46 ± 2.31",
            "70.79 ± 2.47",
            "–",
            "–",
            "3.0",
            "10.0",
            "78,042",
            "–",
        )
    ]


def test_parameters_of_the_method_beside_those_of_the_student(write_run):
    _, cells = table(summarize([load_run(write_run("a", [50.0], method_parameters=12345))]), TOP1)
    assert cells[-2:] == ["78,042", "12,345"]


def taught(top1: float) -> list[dict]:
    return [{"test": {"top1": 1.0, "teacher_top1": top1}, "train": {"teacher_top1": 5.0}}]


def test_gains_over_the_student_alone_and_the_teacher(write_run):
    folders = [
        write_run("n0", [50.0], method="none"),
        write_run("n1", [53.0], method="none", seed=1),
        write_run("d0", [60.0], diagnostics=taught(71.0)),
        write_run("d1", [64.0], seed=1, diagnostics=taught(73.0)),
        write_run("k0", [45.0], method="kd"),
    ]
    rows = summarize([load_run(folder) for folder in folders])
    assert [row.over_baseline for row in rows] == [None, 62.0 - 51.5, 45.0 - 51.5]
    assert [row.over_teacher for row in rows] == [None, 62.0 - 72.0, None]
    _, *cells = table(rows, TOP1)
    assert [line[4:6] for line in cells] == [["–", "–"], ["+10.50", "−10.00"], ["−6.50", "–"]]


def test_the_student_alone_is_the_same_student_on_the_same_data(write_run):
    folders = [
        write_run("teacher", [99.0], method="none", student={"name": "resnet20"}),
        write_run("few", [40.0], method="none", data={"kind": "digits", "train_limit": 9}),
        write_run("short", [50.0], method="none", epochs=3),
        write_run("alone", [55.0], method="none", data={"kind": "digits", "root": "elsewhere"}),
        write_run("d0", [60.0]),
    ]
    assert summarize([load_run(folder) for folder in folders])[-1].over_baseline == 5.0
    assert summarize([load_run(folder) for folder in folders[2::2]])[-1].over_baseline == 10.0
    assert summarize([load_run(folder) for folder in (*folders[:2], folders[-1])])[-1].over_baseline is None


def test_a_teacher_that_only_some_seeds_know(write_run):
    """Runs of an older version have no diagnostics, and runs without a fixed teacher not this metric."""
    folders = [
        write_run("d0", [60.0], diagnostics=taught(71.0)),
        write_run("d1", [64.0], seed=1, diagnostics=[{"test": {"top1": 1.0}, "train": None}]),
    ]
    (row,) = summarize([load_run(folder) for folder in folders])
    assert row.over_teacher is None


def test_damaged_diagnostics(write_run):
    folder = write_run("d0", [60.0], diagnostics=[{"test": {"p_t": "much"}}])
    with pytest.raises(DataError, match=r"diagnostics\.test\.p_t"):
        load_run(folder)


def test_parameters_of_the_method(write_run):
    rows = [
        load_run(write_run("a", [50.0], method_parameters=1234)),
        load_run(write_run("b", [5.0], epochs=2)),
    ]
    assert [row.method_parameters for row in summarize(rows)] == [1234, None]


@pytest.mark.parametrize("lacks", ["folder", "config.json", "env.json"])
def test_a_missing_run(write_run, tmp_path, lacks):
    path = tmp_path / "nowhere"
    if lacks != "folder":
        path = write_run("a", [50.0])
        (path / lacks).unlink()
    with pytest.raises(
        DataError, match=f"{path} is no run folder.*{'no such folder' if lacks == 'folder' else lacks}"
    ):
        load_run(path)


@pytest.mark.parametrize("name", ["config.json", "env.json"])
def test_a_damaged_run(write_run, name):
    path = write_run("a", [50.0])
    (path / name).write_text('{"student": ')
    with pytest.raises(DataError, match="is no run folder"):
        load_run(path)


def test_a_run_of_an_unknown_task(write_run):
    path = write_run("a", [50.0])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"task": "detecting"}))
    with pytest.raises(DataError, match="unknown task 'detecting'; nearest: detection"):
        load_run(path)


@pytest.mark.parametrize("content", [None, "", '{"kind": "train", "step": 1}\n', '{"kind": "eval", "ep'])
def test_a_run_without_an_evaluation(write_run, content):
    path = write_run("a", [50.0])
    (path / "metrics.jsonl").unlink()
    if content is not None:
        (path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="no evaluation"):
        load_run(path)


def test_a_resumed_runs_last_summary_counts(write_run):
    path = write_run("a", [50.0])
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "summary", "ms_per_step": 33.0, "student_parameters": 1}) + "\n")
    assert summarize([load_run(path)])[0].ms_per_step == 33.0
