"""Path of one training step through the code: frames, calls, functions, files and changes of file.

    python benchmarks/step_path.py [--json]

It trains a tiny pair on scikit-learn's digits with a profiler, and counts the Python calls of this package
between the updates of two steps, with a live teacher and with one that is cached. Frames are those from
`mdistiller.train` to the optimizer's `step` (torch's own left out).
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import mdistiller

SOURCE = str(Path(mdistiller.__file__).parent)
STEP = 12  # the step that is counted: not the first one, nor one that ends a window of metrics


class Profile:
    """Calls of the package between two calls of `SGD.step`, and the frames of the second."""

    def __init__(self) -> None:
        self.updates = 0
        self.calls: list[tuple[str, str]] = []
        self.frames: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_qualname == "SGD.step":
            self.updates += 1
            if self.updates == STEP:
                self.frames = _frames(frame)
        elif code.co_filename.startswith(SOURCE) and self.updates == STEP - 1:
            self.calls.append((code.co_filename, code.co_qualname))


def _frames(frame: FrameType | None) -> list[str]:
    """Returns the package's frames above a frame, from `mdistiller.train` on, as FILE:FUNCTION."""
    names: list[str] = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(SOURCE):
            names.append(f"{Path(code.co_filename).relative_to(SOURCE)}:{code.co_qualname}")
            if names[-1] == "api.py:train":
                break
        frame = frame.f_back
    return names[::-1]


def measure(teacher: Path, out: Path, cache: Path | None = None) -> dict[str, Any]:
    """Trains a student for some steps under the profiler; returns the counts."""
    config = mdistiller.get_recipe("digits.dkd.resnet20_resnet8").replace(
        teacher={"checkpoint": teacher}, max_steps=STEP + 1, diagnostics=False, out=out, teacher_cache=cache
    )
    if cache is not None:
        mdistiller.train(config.replace(out=out.with_name("recording")), reporter=False)
    profile = Profile()
    sys.setprofile(profile)
    try:
        mdistiller.train(config, reporter=False)
    finally:
        sys.setprofile(None)
    files = [file for file, _ in profile.calls]
    return {
        "frames from train to optimizer.step": len(profile.frames),
        "files of these frames": len({name.partition(":")[0] for name in profile.frames}),
        "calls in a step": len(profile.calls),
        "functions": len(set(profile.calls)),
        "files": len(set(files)),
        "changes of file": sum(a != b for a, b in pairwise(files)),
        "path": profile.frames,
    }


def main() -> None:
    """Prints the counts."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = mdistiller.get_recipe("digits.teacher.resnet20").replace(
            max_steps=1, diagnostics=False, out=Path(folder) / "teacher"
        )
        weights = mdistiller.train(teacher, reporter=False).folder
        found = {"live": measure(weights, Path(folder) / "live")}
        found["cached"] = measure(weights, Path(folder) / "cached", Path(folder) / "cache")
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    path = found["live"]["path"]
    for name in [name for name in found["live"] if name != "path"]:
        print(f"{name:36} {found['live'][name]:4} live {found['cached'][name]:4} cached")
    print("path: " + " → ".join(path))


if __name__ == "__main__":
    main()
