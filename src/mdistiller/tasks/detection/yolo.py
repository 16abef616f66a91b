"""Images with objects, read from YOLO's text files: one for each image, a line for each object."""

from collections.abc import Iterator
from pathlib import Path

from mdistiller.data.folder import images_below
from mdistiller.errors import DataError
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.listing import SPLITS, Content, as_coco, read_names, upright_size
from mdistiller.training.dense import Split
from mdistiller.types import Line

DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASS_LISTS = ("classes.txt", "obj.names", "labels/classes.txt")
_SLACK = 0.01  # by which rounding may carry a coordinate out of the image


def is_yolo(root: Path) -> bool:
    """Whether a folder has YOLO's description, or a list of classes and a folder of labels."""
    has_labels = any((root / name).is_dir() for name in ("labels", "train/labels"))
    names = (*DESCRIPTIONS, *CLASS_LISTS) if has_labels else DESCRIPTIONS
    return any((root / name).is_file() for name in names)


def read_yolo(config: DetectionDataConfig, split: Split) -> Content:
    """Reads a split in YOLO's layout and returns it as the lists of a COCO-format JSON.

    Class names are in data.yaml (`names`, `train`, `val` …) or, one a line, in classes.txt. The labels of
    `…/images/…/a.jpg` are in `…/labels/…/a.txt`, or beside an image in no folder `images`; an image without
    labels has no object. A line is `class x y width height`, the box's middle and size as fractions of the
    image, or the class and a polygon `x1 y1 x2 y2 …`, which becomes a mask and its box. With `kpt_shape` in
    data.yaml, the numbers after the box are key points, which are not read. Classes count from 0, category
    ids from 1.

    Raises:
        DataError: names, images or labels are missing, or a line is no object of these classes.
    """
    root = config.root
    description = next((root / name for name in DESCRIPTIONS if (root / name).is_file()), None)
    described = {} if description is None else _parse(description)
    if description is not None and "names" in described:
        names = _names(described, description)
    else:
        names = read_names(root, CLASS_LISTS) or []
    if not names:
        raise DataError(f"{root} has no class names: no {' and no '.join((*DESCRIPTIONS, *CLASS_LISTS))}")
    files = [image for source in _sources(config, split, described) for image in _images(source)]
    if not any(label_file(image).is_file() for image in files):
        raise DataError(f"{files[0].parent} has {len(files)} images and no labels: no {label_file(files[0])}")

    def read(image: Path) -> tuple[Path, tuple[int, int], Iterator[Line]]:
        file, size = label_file(image), upright_size(image)
        points = "kpt_shape" in described
        found = _objects(file, names, *size, has_points=points) if file.is_file() else iter(())
        return image, size, found

    return as_coco(config, names, files, read)


def label_file(image: Path) -> Path:
    """Returns the file with the labels of an image: in `labels` for `images`, or beside the image."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _parse(path: Path) -> dict[str, object]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got {type(content).__name__}, need names, train and val")
    return content


def _names(content: dict[str, object], path: Path) -> list[str]:
    names = content["names"]
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise DataError(f"{path}: names: got {names!r}, need a list of different names, or of 0: name, …")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{path}: nc: got {content['nc']!r}; names has {len(names)}")
    return list(map(str, names))


def _sources(config: DetectionDataConfig, split: Split, described: dict[str, object]) -> list[Path]:
    """Finds folders of images, or lists of them."""
    root, given = config.root, getattr(config, f"{split}_images")
    if given is not None:
        candidates = [[str(given)]]
    else:
        named = (described.get(name) for name in SPLITS[split])
        candidates = [list(map(str, v)) if isinstance(v, list) else [str(v)] for v in named if v]
    base = root / str(described.get("path") or "")
    for values in candidates:
        # Roboflow's description has ../train/images for train/images.
        bare = [str(Path(*(part for part in Path(value).parts if part != ".."))) for value in values]
        for folder, relative in ((base, values), (root, values), (root, bare)):
            if all((folder / value).exists() for value in relative):
                return [folder / value for value in relative]
    if candidates:
        looked = ", ".join(str(root / value) for values in candidates for value in values)
        raise DataError(f"{root} has no images for {split}: there is no {looked}")
    usual = [path for name in SPLITS[split] for path in (f"images/{name}", f"{name}/images")]
    usual += ["images"] * (config.val_fraction is not None)
    for path in usual:
        if (root / path).is_dir():
            return [root / path]
    raise DataError(
        f"{root} has no images for {split}: no {', no '.join(usual)}. --data.val-fraction 0.2 splits a set"
    )


def _images(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(images_below(source))
    else:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
        found = [source.parent / line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError(f"{source} has no images")
    return found


def _objects(file: Path, names: list[str], width: int, height: int, *, has_points: bool) -> Iterator[Line]:
    """Yields category id, box in pixels and perhaps a polygon of each line, without the points of a pose."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            label, *values = map(float, words)
        except ValueError:
            raise DataError(f"{file}, line {number}: got {line!r}, need numbers") from None
        values = values[:4] if has_points else values
        where = f"{file}, line {number}"
        if label not in range(len(names)):
            known = ", ".join(f"{i} {name}" for i, name in enumerate(names[:12]))
            more = ", …" if len(names) > 12 else ""
            raise DataError(f"{where}: class {words[0]}; allowed: 0 to {len(names) - 1} ({known}{more})")
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            form = "class x y width height, or class x1 y1 x2 y2 x3 y3 …"
            raise DataError(f"{where}: {len(words)} numbers; allowed: {form}")
        if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
            raise DataError(f"{where}: got {line.strip()!r}; coordinates are fractions of the image, 0 to 1")
        xs = [x * width for x in values[::2]]
        ys = [y * height for y in values[1::2]]
        category = int(label) + 1
        if len(values) == 4:
            (x, w), (y, h) = xs, ys
            yield {"category_id": category, "bbox": [x - w / 2, y - h / 2, w, h]}
        else:
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            polygon = [value for point in zip(xs, ys, strict=True) for value in point]
            yield {"category_id": category, "bbox": box, "segmentation": [polygon]}
