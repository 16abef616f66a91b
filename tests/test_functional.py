"""`mdistiller.functional` needs torch, pydantic and jaxtyping, and nothing heavier."""

import subprocess
import sys

HEAVY = ["torchvision", "timm", "sklearn", "scipy", "rich", "safetensors", "fcntl"]
CODE = f"""
import sys
for name in {HEAVY}:
    assert name not in sys.modules, name
    sys.modules[name] = None  # an import of it raises ImportError
import torch
from mdistiller.functional import __all__, dkd_loss
logits = torch.zeros(2, 3)
assert dkd_loss(logits, logits, torch.tensor([0, 1])) == 0
import mdistiller
assert mdistiller.list_methods()
"""


def test_nothing_heavy_is_imported():
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
