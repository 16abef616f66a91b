"""The benchmark that holds first epochs against official logs, on tiny runs and made-up logs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mdistiller import get_recipe
from mdistiller.training.launch import train

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "official_curves.py"
RECIPE = "cifar100.lskd.resnet56_resnet20"


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("official_curves", FILE)
    module = sys.modules["official_curves"] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FILE.parent))  # for the modules beside it
    spec.loader.exec_module(module)
    sys.path.remove(str(FILE.parent))
    yield module
    del sys.modules["official_curves"]


def log(*pairs):
    """A log as the authors' trainer writes it."""
    parts = []
    for i, (top1, test) in enumerate(pairs):
        values = {"train_acc": top1, "train_loss": 6.84, "test_acc": test, "test_acc_top5": 44.73}
        lines = [f"epoch: {i + 1}", "lr: 0.05", *(f"{key}: {value:.2f}" for key, value in values.items())]
        parts += ["-" * 25, *lines, "-" * 25]
    return "\n".join(parts) + f"\nbest_acc\t{pairs[-1][1]:.2f}"


def test_a_log_is_read_epoch_by_epoch(curves, tmp_path):
    (tmp_path / "log.txt").write_text(log((9.26, 17.2), (23.81, 27.91)))
    assert curves.read_log(tmp_path / "log.txt") == ([9.26, 23.81], [17.2, 27.91])
    (tmp_path / "log.txt").write_text("{}")
    with pytest.raises(SystemExit, match="expected as many train_acc as test_acc"):
        curves.read_log(tmp_path / "log.txt")


def test_logs_are_found_by_recipe(curves, tmp_path):
    for name in (
        "KD/kd,resnet56,resnet20,2,9",
        "KD/kd,wrn_40_2,resnet8x4,2,9",
        "DKD/dkd,vgg13,vgg8,2,15,2.0",
    ):
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(log((len(name), 2.0)))
    for recipe, name in {
        RECIPE: "KD/kd,resnet56,resnet20,2,9",
        "cifar100.lskd.wrn_40_2_resnet8x4": "KD/kd,wrn_40_2,resnet8x4,2,9",
        "cifar100.lskd-dkd.vgg13_vgg8": "DKD/dkd,vgg13,vgg8,2,15,2.0",
    }.items():
        assert curves.official(recipe, tmp_path) == (f"{name}.txt", ([len(name)], [2.0]))
    with pytest.raises(SystemExit, match="found 0 logs"):
        curves.official("cifar100.lskd-dkd.resnet56_resnet20x", tmp_path)


def test_the_vendored_numbers_are_of_known_recipes(curves):
    file, curve = curves.official(RECIPE, None)
    assert file == "KD/kd,resnet56,resnet20,2,9.txt"
    assert curve.train[:2] == [9.26, 23.81]
    assert curve.test[:2] == [17.2, 27.91]
    for recipe in curves.tomllib.loads(curves.VENDORED.read_text()):
        assert len({*map(len, curves.official(recipe, None)[1])}) == 1
        assert get_recipe(recipe).recipe == recipe
    with pytest.raises(SystemExit, match="or give --logs"):
        curves.official("cifar100.kd.vgg13_vgg8", None)


@pytest.mark.parametrize(
    ("train_top1", "test_top1", "close"),
    [
        ([9.2, 23.4], [15.5, 28.0], True),
        ([9.2, 21.0], [15.5, 28.0], False),  # 2.8 points below
        ([9.2, 23.4], [15.5, 36.0], False),
        ([9.2], [15.5], True),
        ([], [], False),
    ],
)
def test_a_curve_is_held_in_its_band(curves, train_top1, test_top1, close):
    _, theirs = curves.official(RECIPE, None)
    found = curves.differences(curves.Curve(train_top1, test_top1), theirs, num_views=1)
    assert curves.is_close(found) == close
    assert len(found["train"]) == len(train_top1)
    assert list(curves.differences(curves.Curve([0.0], [17.0]), theirs, num_views=2)) == ["test"]


def test_a_run_stops_after_its_first_epochs_and_goes_on(curves, tmp_path, monkeypatch):
    def configure(recipe, command):
        return get_recipe("digits.kd.resnet20_resnet8").replace(
            data={"train_limit": 60, "test_limit": 40},
            teacher={"checkpoint": teacher},
            epochs=4,
            batch_size=30,
            diagnostics=False,
            layout="contiguous",
            device="cpu",
            out=command.out / recipe,
        )

    small = get_recipe("digits.student.resnet20").replace(
        data={"train_limit": 20, "test_limit": 20}, epochs=1, device="cpu", out=tmp_path / "teacher"
    )
    teacher = train(small).path / "student.safetensors"
    monkeypatch.setattr(curves, "configure", configure)
    command = curves.Command(data_root=tmp_path, teachers=tmp_path, out=tmp_path / "runs", epochs=1)
    first = curves.first_epochs("run", command)
    assert len(first.test) == 1
    command = command.replace(epochs=3)
    longer = curves.first_epochs("run", command)
    assert longer.test[:1] == first.test
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "eval"] == [1, 2, 3]
    assert not [line for line in lines if line["kind"] == "summary"], "the run is not at its end"
    whole = train(configure("whole", command))
    assert curves.Curve(*(x[:3] for x in curves.measured(whole.path))) == longer
    command = command.replace(run=False, epochs=2)
    assert curves.first_epochs("run", command) == tuple(x[:2] for x in longer)
