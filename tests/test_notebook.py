"""The notebook: its cells run in order, and its runs go on where a killed session left them."""

import json
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from processes import Forked

import mdistiller
from mdistiller.runs.folder import read_metrics

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"


def cells():
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def session(out, epochs, last=None):
    """Runs the code cells as one session, with small data; returns its names."""
    names = {"__name__": "__main__"}
    for cell in cells()[:last]:
        exec(cell, names)
        if "OUT" in names and "tiny" not in names:
            data = {"kind": "digits", "train_limit": 256, "test_limit": 100}
            names |= {"OUT": out, "DATA": data, "EPOCHS": epochs, "tiny": True}
    return names


def test_it_is_a_notebook_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.fixture
def shown(monkeypatch):
    """Stands for IPython: the list of what a session displays."""
    found, module = [], types.ModuleType("IPython.display")
    module.HTML, module.display = str, found.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return found


@pytest.fixture
def _one_thread():
    """As in forked processes: the number of threads is the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_a_killed_session_is_run_again(tmp_path, shown):
    """The teacher's run is read, the student's goes on and has the bits of a run that was not killed."""
    whole = session(tmp_path / "whole", epochs=4, last=-1)
    out = tmp_path / "runs"
    killed = Forked(session, out, 4, -1)
    until = time.monotonic() + 120
    while not (out / "dkd" / "resume.pt").is_file():
        assert killed.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {file: file.read_bytes() for file in (out / "teacher").iterdir()}
    assert not [line for line in read_metrics(out / "dkd") if line["kind"] == "summary"]

    names = session(out, epochs=4)
    assert names["student"].summary["last"] == whole["student"].summary["last"]
    for name in ("teacher", "dkd"):
        weights = [folder / name / "student.safetensors" for folder in (out, tmp_path / "whole")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    starts = [line["step"] for line in read_metrics(out / "dkd") if line["kind"] == "eval"]
    assert starts == [
        line["step"] for line in read_metrics(tmp_path / "whole" / "dkd") if line["kind"] == "eval"
    ]
    changed = [file.name for file, content in before.items() if file.read_bytes() != content]
    assert changed == []
    (frame,) = shown
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert isinstance(names["student"], mdistiller.Run)
