"""Images without labels, and a small vision transformer as the teacher."""

import pytest
import timm
import torch
from small_runs import VIT
from unlabeled import save_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 40 images, at two depths."""
    root = tmp_path_factory.mktemp("any")
    save_images(root / "some", 24)
    save_images(root / "more" / "deep", 16, seed=1)
    return root


@pytest.fixture(scope="session")
def labeled(tmp_path_factory):
    """Class folders of two easy classes."""
    root = tmp_path_factory.mktemp("labeled")
    for i, name in enumerate(("dark", "light")):
        save_images(root / name, 10, seed=i, bias=100 * i)
    return root


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
