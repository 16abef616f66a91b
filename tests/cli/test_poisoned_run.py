"""A run folder is data: no command runs the plug-in that its config names, nor opens a connection."""

import json
import sys

import pytest
from PIL import Image

import mdistiller
from mdistiller.errors import ConfigError

_WATCHED: list[list[str]] = []


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _WATCHED and event in ("socket.connect", "socket.getaddrinfo"):
        _WATCHED[-1].append(f"{event} {args}")


sys.addaudithook(_watch)


@pytest.fixture
def poisoned(cli, student_run, tmp_path):
    """A run folder whose config names a plug-in that leaves a file behind."""
    run, plugin, sentinel = tmp_path / "poisoned", tmp_path / "evil.py", tmp_path / "was_run"
    run.mkdir()
    for file in student_run.iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    plugin.write_text(f"open({str(sentinel)!r}, 'w').close()")
    (run / "config.json").write_text(json.dumps(cli.config(student_run) | {"plugins": [str(plugin)]}))
    connections: list[str] = []
    _WATCHED.append(connections)
    yield run
    _WATCHED.pop()
    assert (sentinel.exists(), connections) == (False, [])


@pytest.mark.parametrize(
    "words",
    [
        ("train", "RUN"),
        ("train", "RUN", "--help"),
        ("train", "RUN", "--dry-run"),
        ("train", "RUN", "--resume"),
        ("train", "RUN/config.json", "--dry-run"),
        ("config", "RUN"),
    ],
    ids=" ".join,
)
def test_a_command_that_repeats_it_asks_for_the_plugin(cli, poisoned, words):
    done = cli(*(word.replace("RUN", str(poisoned)) for word in words))
    assert (done.code, done.out) == (2, "")
    assert f"give --plugin {poisoned.parent / 'evil.py'}" in done.message


@pytest.mark.parametrize(
    "words",
    [
        ("report", "RUN", "--out", "page.html"),
        ("compare", "RUN", "RUN", "--batch", "1"),
        ("eval", "RUN", "--device", "cpu"),
        ("export", "RUN"),
        ("predict", "RUN/student.safetensors", "image.png"),
        ("train", "digits.kd.resnet8", "--teacher", "RUN", "--dry-run"),
    ],
    ids=" ".join,
)
def test_the_other_commands_leave_the_plugin(cli, poisoned, monkeypatch, words):
    monkeypatch.chdir(poisoned.parent)
    Image.new("RGB", (32, 32)).save("image.png")
    data = cli.DATA if words[0] == "train" else ()
    done = cli(*(word.replace("RUN", str(poisoned)) for word in words), *data)
    assert done.code == 0, done.err


def test_python_leaves_the_plugin(poisoned):
    mdistiller.load_student(poisoned)
    run = mdistiller.Run(poisoned)
    assert run.config.plugins == ()
    for start in (run.resume, lambda: mdistiller.train(poisoned / "config.json")):
        with pytest.raises(ConfigError, match=r"give --plugin .*evil\.py"):
            start()
