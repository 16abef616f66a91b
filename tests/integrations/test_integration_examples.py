"""The examples of integrations run, with tiny settings."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "hf_text": "transformers",
    "hf_images": "transformers",
    "lightning_digits": "lightning",
    "timm_task": "timm.task",
}


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    pytest.importorskip(NEEDS[name])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "hf_text":
        _, metrics = module.main(epochs=1, width=16)
        assert math.isfinite(metrics["eval_loss"])
        return
    result, metrics = module.main(epochs=1, limit=128)
    value = metrics if name == "timm_task" else metrics["eval_loss" if "hf" in name else "test_loss"]
    assert math.isfinite(value)
    assert result is not None
