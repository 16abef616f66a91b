"""Images without labels, and a small vision transformer as the teacher."""

import pytest
import timm
import torch
from PIL import Image

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SETTINGS = {
    "epochs": 1,
    "max_steps": 2,
    "batch_size": 8,
    "device": "cpu",
    "log_every": 1,
    "precision": "float32",
}


def save_images(folder, count, seed=0, bias=0):
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(bias, bias + 150, (36 + i % 5, 34, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


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


def small(root, **fields):
    return {"kind": "folder", "root": root, "image_size": 32, "workers": 0, **fields}
