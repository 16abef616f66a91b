"""`mdistiller quickstart`, as it is, with one seed."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

from mdistiller.cli.main import find_command
from mdistiller.cli.quickstart import SETTING

FOLDERS = {"teacher": "teacher", "student alone": "baseline-s0", "KD": "kd-s0", "DKD": "dkd-s0"}


@pytest.fixture(scope="module")
def quickstart(cli, tmp_path_factory):
    """Its folder (which exists, empty), and what it gave."""
    out = tmp_path_factory.mktemp("quickstart")
    return out, cli("quickstart", "--seeds", 1, "--json", "--out", out)


@pytest.mark.slow
def test_rows(cli, quickstart):
    out, done = quickstart
    assert done.code == 0, done.err
    found = done.json()
    assert set(found) == {"setting", "rows", "report"}
    rows = {row["label"]: row for row in found["rows"]}
    assert rows.keys() == FOLDERS.keys()
    for label, row in rows.items():
        summary = cli.metrics(out / FOLDERS[label])[-1]
        assert row["seeds"] == 1
        assert row["finished"]
        assert row["last"] == {"mean": summary["last"]["top1"], "std": None}
        assert row["best"]["mean"] >= row["last"]["mean"]
        assert row["seconds"] > 0
        assert row["ms_per_step"] > 0
    # Room between teacher and student, and a student that learns: what the setting is for.
    teacher, baseline = rows["teacher"]["last"]["mean"], rows["student alone"]["last"]["mean"]
    assert teacher > 90
    assert 20 < baseline < teacher - 5


@pytest.mark.slow
def test_says_its_setting_and_what_was_measured(quickstart):
    out, done = quickstart
    found = done.json()
    assert found["setting"] == SETTING
    assert SETTING in done.message
    assert found["report"] == str(out / "report.html")
    assert "run 1 of 4" not in done.out
    for row in found["rows"]:
        assert f"{FOLDERS[row['label']]} test {row['last']['mean']:5.1f}".replace("  ", " ") in done.message
    page = (out / "report.html").read_text()
    assert html.escape(SETTING) in page
    assert "silhouette" in page
    assert "Missing parts" not in page
    for row in found["rows"]:
        assert row["label"] in page
        assert f">{row['last']['mean']:.2f}</td>" in page


@pytest.mark.slow
def test_ends_with_the_answer_the_report_and_commands_that_work(quickstart):
    out, done = quickstart
    end = done.err.rpartition("writing the report about 4 runs …\n")[2]
    answer, _, rest = end.partition("\nreport: ")
    rows = [row for row in done.json()["rows"] if row["label"] in ("KD", "DKD")]
    best = max(rows, key=lambda row: row["last"]["mean"])
    assert f"{best['label']} {best['last']['mean']:.1f} %" in answer
    assert rest.startswith(f"{out / 'report.html'} (0:0")
    commands = [line.partition("mdistiller ")[2].split() for line in rest.splitlines() if line[:2] == "  "]
    assert [words[0] for words in commands] == ["compare", "export", "train"]
    for command, *args in commands:
        find_command(command).parse(args)


@pytest.mark.slow
def test_run_folders(cli, quickstart):
    out, _ = quickstart
    names = {"teacher", "baseline-s0", "kd-s0", "dkd-s0"}
    assert {path.name for path in out.iterdir()} == {*names, "report.html"}
    for name in names:
        files = {path.name for path in (out / name).iterdir()}
        assert {"config.json", "env.json", "metrics.jsonl", "student.safetensors", "resume.pt"} <= files
    config = cli.config(out / "dkd-s0")
    assert config["method"]["name"] == "dkd"
    assert config["teacher"]["checkpoint"] == str(out / "teacher")
    assert (config["data"]["train_limit"], config["data"]["label_noise"]) == (300, 0.4)
    assert cli.config(out / "teacher")["data"]["label_noise"] == 0


@pytest.mark.slow
def test_a_folder_in_use_is_refused(cli, quickstart):
    out, _ = quickstart
    before = cli.contents(out)
    done = cli("quickstart", "--out", out)
    assert (done.code, done.out) == (2, "")
    assert done.message == f"mdistiller: out: {out} is not empty; choose another folder"
    assert cli.contents(out) == before


@pytest.mark.parametrize("seeds", ["0", "-1"])
def test_seeds_have_to_be_some(cli, tmp_path: Path, monkeypatch, seeds):
    monkeypatch.chdir(tmp_path)
    done = cli("quickstart", "--seeds", seeds)
    assert (done.code, done.out) == (2, "")
    assert done.message == f"mdistiller: seeds: got {seeds}; allowed: 1 or more"
    assert list(tmp_path.iterdir()) == []
