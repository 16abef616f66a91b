"""Images without labels, and the settings of short runs on them."""

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


def small(root, **fields):
    return {"kind": "folder", "root": root, "image_size": 32, "workers": 0, **fields}
