"""`mdistiller bench`: rows that add up, on tiny models and a few steps."""

import json
import statistics

import pytest
import torch

from mdistiller.models import create_model
from mdistiller.runs.checkpoint import save_student

SMALL = ("bench", "resnet14_resnet8", "--images", 32, "--batch-size", 8, "--rounds", 4, "--warmup", 1)


@pytest.fixture(scope="module")
def found(cli, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    done = cli(
        *SMALL,
        "--methods",
        "kd",
        "fitnet",
        "dkd",
        "--cached",
        "kd",
        "fitnet",
        "--dot",
        "dkd",
        "--out",
        out,
        "--json",
    )
    assert done.code == 0, done.err
    return done.json(), out


def test_rows(found):
    result, _ = found
    rows = {row["name"]: row for row in result["rows"]}
    # FitNet reads features, so no cache takes the teacher's place.
    assert list(rows) == ["plain training", "kd", "kd, cache", "fitnet", "dkd", "dkd, DOT"]
    assert {name: row["extra_parameters"] for name, row in rows.items() if row["extra_parameters"]} == {
        "fitnet": 32 * 32 + 3 * 32
    }
    plain = statistics.median(rows["plain training"]["ms"])
    for row in rows.values():
        assert len(row["ms"]) == 3
        assert all(ms > 0 for ms in row["ms"])
        median = sorted(row["ms"])[1]
        assert (row["ms_median"], row["ms_low"], row["ms_high"]) == (median, min(row["ms"]), max(row["ms"]))
        assert row["images_per_second"] == pytest.approx(8000 / median)
        assert row["of_plain"] == pytest.approx(median / plain)
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 0
    assert result["settings"]["batch_size"] == 8
    assert {"cpu", "threads", "gpus", "commit", "versions"} <= set(result["environment"])
    assert "command" not in result["environment"]  # it may hold paths


def test_files(found):
    result, out = found
    assert json.loads((out / "bench.json").read_text()) == result
    lines = (out / "bench.md").read_text().splitlines()
    assert len(lines) == 2 + len(result["rows"])
    assert all(line.count("|") == 8 for line in lines)
    page = (out / "bench.html").read_text()
    assert all(row["name"] in page for row in result["rows"])


def test_losses_before_and_after_with_a_teacher(cli, tmp_path):
    torch.manual_seed(1)
    save_student(tmp_path / "teacher.safetensors", create_model("resnet14", 100), {})
    argv = (
        *SMALL,
        "--rounds",
        12,
        "--methods",
        "kd",
        "--teacher-checkpoint",
        tmp_path / "teacher.safetensors",
    )
    plain, kd, looked_up = cli(*argv, "--json").json()["rows"]
    for row in (plain, kd):
        first, last = row["losses"]
        assert last["loss"] < first["loss"]
    assert [figures["distillation"] for figures in plain["losses"]] == [0, 0]
    # The recipe's KD: 0.9 of the loss at temperature 4, 0.1 of the cross-entropy.
    for figures in kd["losses"]:
        assert figures["distillation"] == pytest.approx(0.9 * figures["kd"], rel=1e-4)
    assert "losses" not in looked_up  # its values are made up
    lines = cli(*argv).out.splitlines()
    assert lines[0].endswith("| loss | distillation | KD loss |")
    assert lines[-1].endswith("|  |  |  |")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("bench", "resnet14_resnet9"), "unknown student 'resnet9'"),
        ((*SMALL, "--methods", "kdd"), "unknown method 'kdd'"),
        ((*SMALL[:-2], "--warmup", 4), "warmup: got 4; allowed: 0 to rounds - 1 = 3"),
        ((*SMALL, "--device", "cuda:99"), "device: got 'cuda:99'"),
    ],
)
def test_bad_usage(cli, argv, said):
    done = cli(*argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.message


def test_progress(cli):
    done = cli(*SMALL[:-4], "--rounds", 2, "--warmup", 1, "--methods", "kd", "--cached", "--json")
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if " of 2" in line]
    # Plain training and KD are built; then there are two rounds.
    names = [line.partition(", ETA")[0] for line in lines]
    assert names == ["building, method 1 of 2", "building, method 2 of 2", "round 1 of 2", "round 2 of 2"]
    assert lines[-1] == "round 2 of 2, ETA 0:00:00"
