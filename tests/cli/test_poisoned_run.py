"""A run folder is data: no command runs code that its files name or hold, nor opens a connection."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import mdistiller
from mdistiller.cli.main import COMMANDS
from mdistiller.errors import ConfigError
from mdistiller.models import ModelConfig, create_model
from mdistiller.tasks.classification.models import create_stored

_WATCHED: list[list[str]] = []


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _WATCHED and event in ("socket.connect", "socket.getaddrinfo"):
        _WATCHED[-1].append(f"{event} {args}")


sys.addaudithook(_watch)


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A path that poison creates where it runs; in the end it is not there, and no socket was opened."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    connections: list[str] = []
    _WATCHED.append(connections)
    yield tmp_path / "was_run"
    _WATCHED.pop()
    assert ((tmp_path / "was_run").exists(), connections) == (False, [])


@pytest.fixture
def copied(student_run, tmp_path):
    """A copy of a run folder."""
    run = tmp_path / "poisoned"
    run.mkdir()
    for file in student_run.iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    return run


@pytest.fixture
def poisoned(cli, copied, sentinel, tmp_path):
    """A run folder whose config names a plug-in that leaves a file behind."""
    plugin = tmp_path / "evil.py"
    plugin.write_text(f"open({str(sentinel)!r}, 'w').close()")
    write_config(cli, copied, plugins=[str(plugin)])
    return copied


def write_config(cli, run, **changes):
    (run / "config.json").write_text(json.dumps(cli.config(run) | changes))


class Evil:
    """An object whose pickle leaves a folder behind."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


@pytest.fixture
def poison(sentinel, tmp_path):
    """Options that have timm load a pickle and fetch an address."""
    torch.save(Evil(sentinel), tmp_path / "evil.pth")
    return {
        "checkpoint_path": str(tmp_path / "evil.pth"),
        "pretrained": True,
        "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/evil.pth", "hf_hub_id": ""},
    }


def write_student(run, network, **changes):
    """Replaces the student in a run folder by a model of another kind."""
    file = run / "student.safetensors"
    with safe_open(file, "pt") as content:
        metadata = json.loads(content.metadata()["mdistiller"])
    save_file(network.state_dict(), file, {"mdistiller": json.dumps(metadata | changes)})


def test_the_poison_is_one(poison, sentinel, tmp_path):
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert sentinel.exists()
    sentinel.rmdir()
    with pytest.raises(Exception, match="refused"):
        create_model("timm/test_resnet", 4, **{k: v for k, v in poison.items() if k != "checkpoint_path"})
    assert _WATCHED[-1]
    _WATCHED[-1].clear()


ASK = [
    ("train", "RUN"),
    ("train", "RUN", "--help"),
    ("train", "RUN", "--dry-run"),
    ("train", "RUN", "--resume"),
    ("train", "RUN/config.json", "--dry-run"),
    ("config", "RUN"),
    ("sweep", "RUN", "--space", "optim.lr=[0.1]"),
]
LEAVE = [
    ("report", "RUN", "--out", "page.html"),
    ("report", "RUN", "--format", "csv"),
    ("compare", "RUN", "RUN", "--batch", "1"),
    ("eval", "RUN", "--device", "cpu"),
    ("export", "RUN"),
    ("predict", "RUN/student.safetensors", "image.png"),
    ("train", "digits.kd.resnet8", "--teacher", "RUN", "--dry-run"),
    ("reproduce", "table6", "--scale", "smoke", "--out", "RUNS", "--teachers", "RUNS", "--no-run"),
]
NOTHING_READ = {"bench", "doctor", "list", "quickstart", "show"}


def test_every_command_is_here():
    assert {words[0] for words in ASK + LEAVE} | NOTHING_READ == set(COMMANDS)


@pytest.mark.parametrize("words", ASK, ids=" ".join)
def test_a_command_that_repeats_it_asks_for_the_plugin(cli, poisoned, words):
    done = cli(*(word.replace("RUN", str(poisoned)) for word in words))
    assert (done.code, done.out) == (2, "")
    assert f"give --plugin {poisoned.parent / 'evil.py'}" in done.message


@pytest.mark.parametrize("words", LEAVE, ids=" ".join)
def test_the_other_commands_leave_the_plugin(cli, poisoned, monkeypatch, words):
    monkeypatch.chdir(poisoned.parent)
    Image.new("RGB", (32, 32)).save("image.png")
    shutil.copytree(poisoned, "RUNS/resnet14")
    data = cli.DATA if words[0] == "train" else ()
    words = [word.replace("RUN", str(poisoned)) if word != "RUNS" else word for word in words]
    done = cli(*words, *data)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    "words",
    [
        ("report", "RUN", "--out", "page.html"),
        ("compare", "RUN", "--batch", "1"),
        ("eval", "RUN", "--device", "cpu"),
        ("export", "RUN"),
        ("predict", "RUN", "image.png"),
        ("train", "digits.kd.resnet8", "--teacher", "RUN", "--dry-run"),
    ],
    ids=" ".join,
)
def test_options_of_a_file_load_nothing(cli, copied, poison, teacher_run, monkeypatch, words):
    """Those in the metadata of the student, and those of student and teacher in the config."""
    monkeypatch.chdir(copied.parent)
    Image.new("RGB", (32, 32)).save("image.png")
    model = {"name": "timm/test_resnet", "options": poison}
    write_student(copied, create_model(model["name"], 4), model=model["name"], options=poison)
    write_config(cli, copied, student=model, teacher=model | {"checkpoint": str(copied)})
    data = cli.DATA if words[0] == "train" else ()
    done = cli(*(word.replace("RUN", str(copied)) for word in words), *data)
    assert done.code == 0, done.err


def test_options_of_an_extended_student_load_nothing(cli, copied, poison, monkeypatch):
    monkeypatch.chdir(copied.parent)
    Image.new("RGB", (32, 32)).save("image.png")
    extension = {"method": {"name": "simkd"}, "teacher": "timm/test_resnet", "teacher_options": {}}
    extension["image_size"] = 32
    write_student(copied, create_model("resnet8", 4), extension=extension)
    model = create_stored(ModelConfig(name="resnet8", checkpoint=copied), 4)
    write_student(copied, model, extension=extension | {"teacher_options": poison})
    done = cli("predict", copied, "image.png")
    assert done.code == 0, done.err


def test_a_pretrained_teacher_is_not_fetched_for_a_config(cli, copied, poison, teacher_run):
    write_config(cli, copied, teacher={"name": "timm/test_resnet", "options": poison})
    with pytest.warns(UserWarning, match="teacher left out: a teacher of .* has no checkpoint file"):
        done = cli("compare", copied, "--batch", 1)
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", ["eval", "compare", "export"])
@pytest.mark.filterwarnings("ignore:accuracy of model.safetensors. not measured", "ignore:teacher left out")
def test_data_are_not_fetched_for_a_config(cli, copied, sentinel, command):
    gone = copied.parent / "gone"
    write_config(cli, copied, data={"kind": "cifar100", "root": str(gone)})
    done = cli(command, copied)
    assert done.code == (0 if command == "export" else 1), done.err
    assert command == "export" or "the download is off" in done.message
    assert not gone.exists()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_exports_in_a_run_folder_are_not_opened(cli, copied, sentinel, monkeypatch, command):
    done = cli("export", copied, "--format", "torch-export", "--no-eval")
    assert done.code == 0, done.err
    monkeypatch.setattr(torch.export, "load", lambda file: sentinel.touch())
    (copied / "export" / "student-torch-export" / "model.pt2").write_bytes(pickle.dumps(Evil(sentinel)))
    done = cli(command, copied, *(("--out", copied / "page.html") if command == "report" else ("--batch", 1)))
    assert done.code == 0, done.err


def test_a_cache_of_pickles_is_no_cache(cli, teacher_run, sentinel, tmp_path):
    cache = tmp_path / "cache"
    words = ("train", "digits.kd.resnet8", *cli.FAST, "--teacher", teacher_run, "--epochs", 1)
    done = cli(*words, "--teacher-cache", cache, "--out", tmp_path / "one")
    assert done.code == 0, done.err
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert files
    for file in files:
        torch.save(Evil(sentinel), file)
    done = cli(*words, "--teacher-cache", cache, "--out", tmp_path / "two")
    assert done.code in (0, 1), done.err
    assert done.code == 0 or str(cache) in done.err


def test_python_leaves_the_plugin(poisoned):
    mdistiller.load_student(poisoned)
    run = mdistiller.Run(poisoned)
    assert run.config.plugins == ()
    for start in (run.resume, lambda: mdistiller.train(poisoned / "config.json")):
        with pytest.raises(ConfigError, match=r"give --plugin .*evil\.py"):
            start()


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "words", [("train", "RUN"), ("eval", "RUN"), ("export", "RUN"), ("compare", "RUN")], ids=" ".join
)
@pytest.mark.filterwarnings("ignore:teacher left out")
def test_an_address_in_a_config_is_not_opened(cli, copied, sentinel, tmp_path, words, role):
    """hf:// opens a connection where the user types it."""
    model = {"name": "resnet8", "checkpoint": "hf://evil/student"}
    write_config(cli, copied, **{role: model})
    done = cli(*(word.replace("RUN", str(copied)) for word in words))
    assert done.code == (0 if words[0] != "train" else 1), done.err
    said = "no such checkpoint: hf:/evil/student; hf:// is opened only where it is typed"
    assert words[0] != "train" or said in done.message
