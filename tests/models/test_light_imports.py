"""Models and taps import without the packages that only some of their functions need."""

import subprocess
import sys
from pathlib import Path

import mdistiller

CODE = """
import sys, types
for name in ("torchvision", "timm", "sklearn", "scipy", "rich", "safetensors", "PIL"):
    sys.modules[name] = None
package = types.ModuleType("mdistiller")  # only the modules that are named below, not the public face
package.__path__ = [sys.argv[1]]
sys.modules["mdistiller"] = package
import mdistiller.taps, mdistiller.models.external
from mdistiller.models import create_model
import torch
model = mdistiller.taps.tap(create_model("resnet8"), ["stage1", "last_map"])
assert model(torch.zeros(2, 3, 32, 32)).features["last_map"].shape == (2, 64, 8, 8)
"""


def test_models_and_taps_need_torch_pydantic_and_numpy_only():
    folder = str(Path(mdistiller.__file__).parent)
    done = subprocess.run([sys.executable, "-c", CODE, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
