"""Rows of a comparison against the runs' own records and against counts by hand."""

import json
import shutil
import warnings

import pytest
import torch

from mdistiller.cli.compare import compare
from mdistiller.deploy.export import export_student
from mdistiller.errors import CheckpointError, ConfigError, DataError
from mdistiller.models import create_model
from mdistiller.report import write_report
from mdistiller.report.costs import COMPARISON, read_comparison


@pytest.fixture(scope="module")
def folders(real_runs, tmp_path_factory):
    """Copies of the runs, whose teacher is the original; DKD's first seed has two exports."""
    root = tmp_path_factory.mktemp("compare")
    copies = [shutil.copytree(folder, root / folder.name) for folder in real_runs]
    export_student(copies[2], evaluate=False)
    export_student(copies[2], "onnx", int8=True)
    return copies


@pytest.fixture(scope="module")
def found(folders):
    return compare([folders[2], folders[3], folders[1]], exports(folders[2]), batches=(1, 4))


def exports(folder):
    return sorted((folder / "export").iterdir())


def last(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"][-1]


def test_rows(found, folders):
    _, alone, first, second = folders
    dkd = "DKD, seed"
    assert [row.label for row in found.rows] == [
        "teacher",
        "student alone",
        f"{dkd} 0",
        f"{dkd} 0, onnx int8",
        f"{dkd} 0, safetensors",
        f"{dkd} 1",
    ]
    teacher, baseline, one, int8, weights, two = found.rows
    # The same metrics as the loop's own evaluation.
    for row, folder in ((baseline, alone), (one, first), (weights, first), (two, second)):
        assert row.metric == pytest.approx(last(folder)["top1"])
        assert row.bytes == (folder / "student.safetensors").stat().st_size
    assert teacher.metric == pytest.approx(last(first)["diagnostics"]["test"]["teacher_top1"])
    card = json.loads((first / "export" / "student-onnx-int8" / "card.json").read_text())
    assert int8.metric == pytest.approx(card["measured"]["value"])
    assert int8.bytes == card["bytes"] < 0.5 * one.bytes
    assert baseline.over_alone is None
    for row in (teacher, one, int8, weights, two):
        assert row.over_alone == pytest.approx(row.metric - baseline.metric)
    for row in found.rows:
        model = create_model("resnet14" if row is teacher else "resnet8", 10)
        assert row.parameters == sum(p.numel() for p in model.parameters())
        assert set(row.ms) == {1, 4}
        assert all(ms > 0 for ms in row.ms.values())
    assert teacher.macs > 1.5 * one.macs > one.macs == int8.macs == baseline.macs > 1e6
    assert (found.metric, found.measured, found.test_set) == ("top1", True, "digits")
    assert found.machine.threads == torch.get_num_threads()


def test_it_is_kept_in_the_run_folders_and_in_the_report(found, folders, tmp_path):
    for folder in folders[1:]:
        assert read_comparison(folder) == found
    assert read_comparison(folders[0]) is None
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("Table of accuracy and cost") == 1  # three folders hold the same
    assert '<h2 id="cost">Cost and accuracy</h2>' in text
    assert "DKD, seed 0, onnx int8" in text
    assert f"milliseconds an image on {found.machine}" in text
    plain = write_report(folders[:1], tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "Cost and accuracy" not in plain


def test_the_teachers_own_run_is_the_teacher(folders, real_runs, tmp_path):
    runs = [folders[2], folders[1], real_runs[0]]
    found = compare(runs, exports(folders[2]), batches=(1,), evaluate=False)
    labels = [row.label for row in found.rows]
    assert labels[:2] == ["teacher", "student alone"]
    assert not any("alone: resnet14" in label for label in labels)
    (real_runs[0] / COMPARISON).unlink()
    # Recorded metrics.
    assert not found.measured
    teacher, alone, one, int8, weights = found.rows
    assert teacher.metric == last(folders[2])["diagnostics"]["test"]["teacher_top1"]
    assert (alone.metric, one.metric) == (last(folders[1])["top1"], last(folders[2])["top1"])
    assert int8.metric is not None
    assert weights.metric is None  # that export was not evaluated
    assert weights.over_alone is None


def test_exports_are_opened_only_when_named(folders, monkeypatch):
    from mdistiller.cli import compare as module

    opened = []
    monkeypatch.setattr(module, "load_export", lambda folder, device: opened.append(folder))
    found = compare([folders[2]], batches=(1,), evaluate=False)
    assert [row.label for row in found.rows] == ["teacher", "DKD"]
    assert opened == []


def test_a_missing_teacher_is_left_out_and_a_damaged_export_refused(folders, tmp_path):
    run = shutil.copytree(folders[2], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["teacher"]["checkpoint"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    file = run / "export" / "student-safetensors" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = compare([run], exports(run)[:1], batches=(1,), evaluate=False)
        with pytest.raises(CheckpointError, match="damaged, or replaced"):
            compare([run], exports(run), batches=(1,), evaluate=False)
    message, *_ = (str(w.message) for w in seen)
    assert message.startswith("teacher left out: no such checkpoint")
    assert [row.label for row in found.rows] == [
        "DKD",
        "DKD, onnx int8",
    ]
    assert [row.over_alone for row in found.rows] == [None, None]


def test_further_exports(folders, real_runs, tmp_path):
    out, _ = export_student(folders[1], out=tmp_path / "alone", evaluate=False)
    found = compare([folders[1]], [out], batches=(1,), evaluate=False)
    assert [row.label for row in found.rows] == [
        "student alone",
        "student alone, safetensors",
    ]
    foreign, _ = export_student(real_runs[0], out=tmp_path / "foreign", evaluate=False)
    with pytest.raises(CheckpointError, match="no student of these runs' models"):
        compare([folders[1]], [foreign], batches=(1,), evaluate=False)


def test_what_does_not_compare(folders, tmp_path):
    other = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["data"]["test_limit"] = 40
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"different test sets .*40 test images"):
        compare([folders[1], other])
    with pytest.raises(DataError, match="is no run folder"):
        compare([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="batch: got 0; allowed: 1 or more"):
        compare([folders[1]], batches=(1, 0))
    (other / COMPARISON).write_text('{"rows": 3}')
    with pytest.raises(DataError, match=r"compare\.json: .*rows"):
        read_comparison(other)
    # A damaged comparison does not keep the report from being written.
    text = write_report([other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "compare.json: " in text
