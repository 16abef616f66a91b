"""Small images of colored squares with masks, in VOC's layout, and runs on them."""

import numpy as np
from PIL import Image

from mdistiller.recipes import get_recipe

CLASSES = ("ground", "red", "blue")
_COLORS = ((90, 90, 90), (220, 40, 40), (40, 60, 220))
MODEL = "lraspp_mobilenet_v3_small"
TEACHER = "fcn_resnet18"


def write_squares(root, split, count, seed=0):
    """Writes images of 72 x 56 pixels; a square's border of one pixel is ignored."""
    rng = np.random.default_rng(seed)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True, exist_ok=True)
    names = [f"{split}{i}" for i in range(count)]
    for name in names:
        mask = np.zeros((56, 72), np.uint8)
        for number in (1, 2):
            y, x, side = rng.integers(0, 30), rng.integers(0, 46), rng.integers(16, 26)
            mask[y : y + side, x : x + side] = 255
            mask[y + 1 : y + side - 1, x + 1 : x + side - 1] = number
        pixels = np.array(_COLORS)[np.where(mask == 255, 0, mask)] + rng.normal(0, 12, (56, 72, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "JPEGImages" / f"{name}.png")
        drawn = Image.fromarray(mask, mode="L")
        drawn.putpalette([7 * i % 256 for i in range(768)])
        drawn.save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def settings(root, **changes):
    base = {
        "data": {"kind": "voc", "root": root, "workers": 0},
        "augment": {"crop": (48, 48), "scale": (0.8, 1.2), "short_side": None},
        **{"epochs": 2, "batch_size": 4, "eval_every": 2, "device": "cpu", "layout": "contiguous"},
    }
    return base | changes


def student(root, **changes):
    return get_recipe(f"coco-seg.student.{MODEL}").replace(**settings(root, **changes))


def pair(root, method, teacher, **changes):
    recipe = get_recipe(f"coco-seg.{method}.{TEACHER}_{MODEL}")
    return recipe.replace(**settings(root, teacher={"checkpoint": teacher}, **changes))
