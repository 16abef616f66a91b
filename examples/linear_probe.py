"""Linear probe: logistic regression on students' frozen features of other images, as in the paper's Table 13.

    python examples/linear_probe.py RUN… --data DIR

DIR contains class folders in `train` and `val`, or STL-10 (`stl10_binary`). The images are scaled to the
size that the student was trained on. Prints one line per run.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.datasets import STL10, ImageFolder
from torchvision.transforms import v2

import mdistiller


def open_images(root, split, transform):
    """Returns the data set of a split, `train` or `val`."""
    if (root / "stl10_binary").is_dir():
        return STL10(str(root), "test" if split == "val" else split, transform=transform)
    return ImageFolder(str(root / split), transform=transform)


@torch.no_grad()
def features_of(student, images):
    """Returns the student's pooled features and the labels."""
    tapped, features, labels = mdistiller.tap(student.eval(), ["pooled"]), [], []
    for batch, label in torch.utils.data.DataLoader(images, batch_size=500):
        features.append(tapped(batch).features["pooled"].flatten(1))
        labels.append(label)
    tapped.untap()
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def probe(run, root):
    """Returns the test accuracy in percent; the regression's penalty is the same for every student."""
    with safe_open(run / "student.safetensors", "pt") as file:
        about = json.loads(file.metadata()["mdistiller"])
    size = about["image_size"]
    transform = v2.Compose(
        [
            *(v2.ToImage(), v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize(about["mean"], about["std"]),
        ]
    )
    student = mdistiller.load_student(run)
    train, test = (features_of(student, open_images(root, split, transform)) for split in ("train", "val"))
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(*train)
    return 100 * regression.score(*test)


def main(argv=None):
    """Prints and returns the accuracy of each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True, type=Path)
    args = parser.parse_args(argv)
    found = {run: probe(run, args.data) for run in args.runs}
    for run, accuracy in found.items():
        print(f"{run}: {accuracy:.2f} %")
    return found


if __name__ == "__main__":
    main()
