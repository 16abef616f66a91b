"""Boxes drawn on images, with labels that do not cover each other."""

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_SHORT = 320  # least short side of a drawing; in smaller ones labels would cover the objects
Rectangle = tuple[float, float, float, float]


def place_labels(
    boxes: Sequence[Sequence[float]], widths: Sequence[float], height: float, size: tuple[float, float]
) -> list[tuple[float, float] | None]:
    """Places a label at each box, within the image, on no other label, and on no box if there is room.

    Args:
        boxes: x1, y1, x2, y2; the first ones choose first.
        widths: the labels' widths, in the boxes' unit.
        height: height of all labels.
        size: (width, height) of the image.

    Returns:
        The upper left corner of each label; None where all its positions are taken.
    """
    placed: list[Rectangle] = []
    found: list[tuple[float, float] | None] = []
    for (x1, y1, x2, y2), width in zip(boxes, widths, strict=True):
        right = x2 - width
        positions = [
            (x1, y1 - height),
            (x1, y2),
            (right, y1 - height),
            (right, y2),
            (x1, y1),
            (right, y2 - height),
        ]
        inside = [(max(0.0, min(x, size[0] - width)), y) for x, y in positions if 0 <= y <= size[1] - height]
        places: list[Rectangle] = [(x, y, x + width, y + height) for x, y in inside]
        free = [place for place in places if not any(_overlap(place, other) for other in placed)]
        clear = (place for place in free if not any(_overlap(place, box) for box in boxes))
        best = next(clear, free[0] if free else None)
        placed += [] if best is None else [best]
        found.append(None if best is None else best[:2])
    return found


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def class_color(number: int) -> tuple[int, int, int]:
    """Returns the color of a class, whose hue is far from those of the classes before it."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """Returns a copy of an RGB image with boxes and their texts.

    Its short side has 320 pixels or more, by a whole factor. A text that would cover another one is left out;
    those of the first boxes come first.
    """
    scale = max(1, -(-_SHORT // min(image.size)))
    boxes = [[scale * x for x in box] for box in boxes]
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    short = min(image.size)
    line, size = max(1, round(short / 250)), min(max(9, short // 32), 28)
    font = ImageFont.load_default(size)
    for (x1, y1, x2, y2), color in reversed(list(zip(boxes, colors, strict=True))):
        canvas.rectangle((min(x1, x2), min(y1, y2), x2, y2), outline=color, width=line)
    widths = [canvas.textlength(text, font) + 4 for text in texts]
    places = place_labels(boxes, widths, size + 4, image.size)
    for text, width, place, color in zip(texts, widths, places, colors, strict=True):
        if text and place is not None:
            x, y = place
            canvas.rectangle((x, y, x + width, y + size + 4), fill=color)
            bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
            canvas.text((x + 2, y + 1), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)
    return drawn
