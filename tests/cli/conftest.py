"""The command line in this process, and small runs that many tests read."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mdistiller.cli.main import run

CLOCK = ("seconds", "ms_per_step")


@dataclass(frozen=True)
class Done:
    """Exit code, and what was written to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """stderr on one line."""
        return " ".join(self.err.split())

    def json(self) -> Any:
        """The only thing on stdout: one JSON document on one line."""
        assert self.out.endswith("\n"), self.err
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


class CommandLine:
    """`cli(*argv)` is `mdistiller ARGV`; an exception is a traceback to the user, and passes through."""

    # 64 training and 32 test images of 16 pixels in 4 classes; two steps an epoch.
    DATA = (
        *("--data.kind", "synthetic", "--data.synthetic-classes", "4"),
        *("--data.synthetic-samples", "64", "--data.image-size", "16", "--device", "cpu"),
    )
    FAST = (*DATA, "--batch-size", "32", "--log-every", "1")

    def __call__(self, *argv: object) -> Done:
        # With an encoding, as a terminal has it.
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run([str(word) for word in argv])
            except SystemExit as end:
                code = 0 if end.code is None else end.code
        assert isinstance(code, int)
        return Done(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))

    @staticmethod
    def config(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "config.json").read_text())

    @staticmethod
    def metrics(folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    @classmethod
    def timeless(cls, folder: Path) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl less what a clock measured."""
        lines = cls.metrics(folder)
        return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]

    @staticmethod
    def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
        """Bytes and time of change of every file below a folder."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


@pytest.fixture(scope="session")
def cli() -> CommandLine:
    """`cli(*argv)` runs the command and gives exit code, stdout and stderr."""
    return CommandLine()


@pytest.fixture(scope="session")
def teacher_run(cli, tmp_path_factory) -> Path:
    """A run folder with a trained teacher."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    done = cli("train", "digits.teacher.resnet8", *cli.FAST, "--epochs", 2, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="session")
def student(cli, teacher_run) -> tuple[Path, Done]:
    """A run folder of DKD over two epochs, and what the command gave with --json."""
    out = teacher_run.parent / "student"
    argv = ("train", "digits.dkd.resnet8_resnet8", *cli.FAST, "--epochs", 2, "--seed", 3, "--json")
    return out, cli(*argv, "--teacher.checkpoint", teacher_run, "--out", out)


@pytest.fixture
def student_run(student) -> Path:
    """The run folder of `student`."""
    return student[0]


@pytest.fixture
def forget_plugins(registries):
    """Forgets the plug-ins that a test loads: when called, and at its end."""
    modules = set(sys.modules)

    def forget() -> None:
        registries()
        for name in set(sys.modules) - modules:
            if name.startswith("mdistiller_plugin_"):
                del sys.modules[name]

    yield forget
    forget()
