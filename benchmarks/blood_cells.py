"""A drawn set of blood smears with exact boxes, in COCO's format: six kinds of cells, 144 x 144 pixels.

    python benchmarks/blood_cells.py OUT

Red cells are many and overlap; the four kinds of white cells differ in the shape of the nucleus and in their
granules, and platelets are small. Brightness, stain, blur and noise differ from image to image. The same seed
draws the same images. `detection_rows.py` trains on it.
"""

import json
import math
from pathlib import Path

import numpy as np
from flags import read
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from mdistiller.cli.flags import Positional
from mdistiller.settings import Settings

CLASSES = ("red cell", "neutrophil", "lymphocyte", "monocyte", "eosinophil", "platelet")
SIDE, SCALE = 144, 3  # pixels of an image; of the drawing for each of them
WHITE = CLASSES[1:5]


class Command(Settings):
    """Draw the set."""

    out: Positional[Path]
    """Folder for images/, instances_train.json and instances_val.json."""
    train: int = 300
    """Training images."""
    val: int = 120
    """Test images."""
    seed: int = 0
    """Seed of the drawings."""


def blob(
    rng: np.random.Generator,
    center: np.ndarray,
    radius: float,
    *,
    stretch: float = 1.15,
    wobble: float = 0.04,
) -> Image.Image:
    """Draws the mask of an ellipse with a slightly uneven edge; center and radius in drawn pixels."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    turn, long = rng.uniform(0, np.pi), rng.uniform(1, stretch)
    edge = 1 + sum(
        rng.uniform(0, wobble) * np.cos(n * angles + rng.uniform(0, 2 * np.pi)) for n in range(2, 6)
    )
    x, y = radius * edge * long * np.cos(angles), radius * edge / long * np.sin(angles)
    cos, sin = math.cos(turn), math.sin(turn)
    points = center + np.stack([cos * x - sin * y, sin * x + cos * y], 1)
    mask = Image.new("L", (SIDE * SCALE,) * 2)
    ImageDraw.Draw(mask).polygon([tuple(p) for p in points.tolist()], fill=255)
    return mask


class Smear:
    """One image that is drawn, and its objects."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.stain = rng.normal(1, 0.12, 3) * rng.uniform(0.85, 1.1)
        self.picture = Image.new("RGB", (SIDE * SCALE,) * 2, self._color((226, 214, 214)))
        self.boxes: list[tuple[int, list[float]]] = []

    def _color(self, color: tuple[int, int, int]) -> tuple[int, ...]:
        changed = np.array(color) * self.stain + self.rng.normal(0, 4, 3)
        return tuple(int(c) for c in changed.clip(0, 255))

    def paint(self, mask: Image.Image, color: tuple[int, int, int], opacity: float) -> None:
        """Lays a color over the masked part, with a soft edge."""
        soft = mask.filter(ImageFilter.GaussianBlur(SCALE * 0.5)).point(lambda v: round(v * opacity))
        self.picture.paste(self._color(color), (0, 0), soft)

    def add(self, kind: str, center: np.ndarray) -> None:
        """Draws a cell around a point in drawn pixels; its box is that of its outline within the image."""
        rng = self.rng
        if kind == "red cell":
            radius = rng.uniform(9.5, 12.5) * SCALE
            outline = blob(rng, center, radius)
            self.paint(outline, (205, 140, 140), 0.75)
            self.paint(blob(rng, center, radius * 0.4, wobble=0.02), (228, 195, 195), 0.7)
        elif kind == "platelet":
            outline = blob(rng, center, rng.uniform(3.5, 5) * SCALE, stretch=1.3, wobble=0.12)
            self.paint(outline, (150, 110, 175), 0.85)
        else:
            outline = self._white(kind, center)
        box = outline.point(lambda v: 255 * (v > 127)).getbbox()
        if box is not None:
            self.boxes.append((CLASSES.index(kind) + 1, [side / SCALE for side in box]))

    def _white(self, kind: str, center: np.ndarray) -> Image.Image:
        rng = self.rng
        radius = rng.uniform(*{"lymphocyte": (12, 15), "monocyte": (17, 20)}.get(kind, (15, 18))) * SCALE
        outline = blob(rng, center, radius, wobble=0.06)
        self.paint(
            outline,
            {"lymphocyte": (175, 180, 215), "monocyte": (185, 185, 205)}.get(kind, (215, 190, 205)),
            0.9,
        )
        if kind == "lymphocyte":
            nucleus = blob(rng, center, radius * rng.uniform(0.72, 0.85))
        elif kind == "monocyte":
            angle, offset = rng.uniform(0, 2 * np.pi), radius * 0.45
            bite = center + offset * np.array([math.cos(angle), math.sin(angle)])
            whole = blob(rng, center, radius * 0.68)
            nucleus = ImageChops.subtract(whole, blob(rng, bite, radius * rng.uniform(0.25, 0.4)))
        else:
            lobes = 2 if kind == "eosinophil" else int(rng.integers(2, 5))
            turn, nucleus = rng.uniform(0, 2 * np.pi), Image.new("L", outline.size)
            for i in range(lobes):
                angle = turn + (i - (lobes - 1) / 2) * rng.uniform(1.1, 1.6)
                at = center + radius * 0.45 * np.array([math.cos(angle), math.sin(angle)])
                nucleus = ImageChops.lighter(nucleus, blob(rng, at, radius * rng.uniform(0.28, 0.36)))
        self.paint(ImageChops.darker(nucleus, outline), (95, 65, 150), 0.9)
        if kind == "eosinophil":
            grains = Image.new("L", outline.size)
            draw = ImageDraw.Draw(grains)
            for _ in range(90):
                angle, far = rng.uniform(0, 2 * np.pi), radius * math.sqrt(rng.uniform(0, 0.9))
                x, y = center + far * np.array([math.cos(angle), math.sin(angle)])
                draw.ellipse((x - SCALE * 0.7, y - SCALE * 0.7, x + SCALE * 0.7, y + SCALE * 0.7), fill=255)
            self.paint(ImageChops.darker(grains, ImageChops.subtract(outline, nucleus)), (205, 105, 85), 0.8)
        return outline

    def finish(self) -> Image.Image:
        """Returns the image in its size, blurred and with noise."""
        rng = self.rng
        picture = self.picture.filter(ImageFilter.GaussianBlur(SCALE * rng.uniform(0.1, 0.9)))
        pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
        slope = 1 + rng.normal(0, 0.06, 2) @ (np.mgrid[:SIDE, :SIDE] / SIDE - 0.5).reshape(2, -1)
        pixels = pixels * slope.reshape(SIDE, SIDE, 1) + rng.normal(0, rng.uniform(2, 9), pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def draw(rng: np.random.Generator) -> Smear:
    """Draws an image: 4 to 14 red cells, one or two white ones, up to four platelets."""
    smear = Smear(rng)
    kinds = ["red cell"] * int(rng.integers(4, 15)) + ["platelet"] * int(rng.integers(0, 5))
    kinds += [WHITE[i] for i in rng.integers(0, len(WHITE), rng.integers(1, 3))]
    taken: list[tuple[np.ndarray, float]] = []
    for kind in kinds:
        reach = {"red cell": 9.0, "platelet": 5.0}.get(kind, 15.0)  # of which others keep away
        for _ in range(50):
            center = rng.uniform(6, SIDE - 6, 2)
            if all(np.hypot(*(center - other)) > reach + far for other, far in taken):
                taken.append((center, reach))
                smear.add(kind, center * SCALE)
                break
    return smear


def write(folder: Path, name: str, count: int, rng: np.random.Generator) -> None:
    """Writes the images of a split and its annotations."""
    images, objects = [], []
    for i in range(count):
        smear = draw(rng)
        file = f"{name}-{i:03}.png"
        smear.finish().save(folder / "images" / file)
        images.append({"id": i + 1, "file_name": file, "width": SIDE, "height": SIDE})
        for label, (x1, y1, x2, y2) in smear.boxes:
            size = [x2 - x1, y2 - y1]
            whole = {"id": len(objects) + 1, "image_id": i + 1, "category_id": label, "iscrowd": 0}
            objects.append(whole | {"bbox": [x1, y1, *size], "area": size[0] * size[1]})
    categories = [{"id": i, "name": kind} for i, kind in enumerate(CLASSES, 1)]
    whole = {"images": images, "annotations": objects, "categories": categories}
    (folder / f"instances_{name}.json").write_text(json.dumps(whole), encoding="utf-8")


def main(c: Command) -> None:
    """Draws both splits."""
    (c.out / "images").mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("train", "val")):
        write(c.out, name, getattr(c, name), np.random.default_rng([c.seed, i]))


if __name__ == "__main__":
    main(read(Command))
