"""Mean and standard deviation by the config, whatever the data."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mdistiller.data import DataConfig, load_data

OTHER = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 1.0)}


def folder(root):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / split / name / "0.png")
    return {"root": root, "image_size": 8}


@pytest.mark.parametrize("kind", ["synthetic", "digits", "folder"])
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_they_go_before_the_sets_own(kind, memory, tmp_path):
    config = DataConfig(kind=kind, memory=memory, **(folder(tmp_path) if kind == "folder" else {}))
    own = load_data(config)
    both = load_data(config.model_copy(update=OTHER))
    assert (both.mean, both.std) == (OTHER["mean"], OTHER["std"])
    assert (own.mean, own.std) != (both.mean, both.std)
    one = load_data(config.model_copy(update={"std": OTHER["std"]}))
    assert (one.mean, one.std) == (own.mean, OTHER["std"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean, std: got 2 and 3 numbers .*one number for each channel"),
        ({"mean": (0.5, 0.5, 0.5, 0.5)}, "mean, std: got 4 and 3 numbers .*one number for each channel"),
        ({"mean": (123.7, 116.3, 103.5)}, "less than or equal to 1"),  # of images up to 255
        ({"mean": (0.5, float("nan"), 0.5)}, "mean.1"),
        ({"std": (0.5, 0.0, 0.5)}, "greater than 0"),
        ({"std": (0.5, -0.1, 0.5)}, "greater than 0"),
    ],
)
def test_values_that_cannot_be(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)
