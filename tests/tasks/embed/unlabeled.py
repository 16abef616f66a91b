"""Images without labels, and runs on them."""

import torch
from PIL import Image


def save_images(folder, count, seed=0, bias=0):
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(bias, bias + 150, (36 + i % 5, 34, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


def small(root, **fields):
    return {"kind": "folder", "root": root, "image_size": 32, "workers": 0, **fields}
