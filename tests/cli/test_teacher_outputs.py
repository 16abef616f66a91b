"""`--teacher-outputs FILE`: a teacher whose outputs were computed elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mdistiller
from mdistiller.data import DataConfig, load_data
from mdistiller.errors import DataError
from mdistiller.stored import image_names, read_outputs


def test_the_command_trains_from_a_file(cli, tmp_path):
    rng, names, logits = np.random.default_rng(0), [], []
    for split, count in (("train", 20), ("val", 5)):
        for i in range(2 * count):
            label = i % 2
            file = tmp_path / "data" / split / "ab"[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(file)
            if split == "train":
                names.append(f"{'ab'[label]}/{i}.png")
                logits.append([4.0 * (label == 0), 4.0 * (label == 1)])
    np.savez(tmp_path / "outputs.npz", names=names[::-1], logits=logits[::-1])
    args = ["train", "folder.kd.resnet8", "--data.root", tmp_path / "data", "--data.image-size", "32"]
    args += ["--epochs", "4", "--batch-size", "10", "--device", "cpu", "--layout", "contiguous"]
    # The teacher alone tells the classes.
    args += ["--method.task-weight", "0", "--teacher-outputs", tmp_path / "outputs.npz"]
    done = cli(*args, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    run = mdistiller.Run(tmp_path / "run")
    assert run.summary["best"]["top1"] == 100.0
    assert run.config.teacher.name == "stored"
    assert cli("report", tmp_path / "run", "--out", tmp_path / "report.html").code == 0
    done = cli(*args, "--teacher", "resnet20")
    assert done.code == 2
    assert "in place of --teacher" in done.message


def test_a_column_of_a_hugging_face_set_has_the_outputs(tmp_path):
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((12, 3)).astype(np.float32)
    columns = {
        "image": [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(12)],
        "label": [i % 3 for i in range(12)],
        "teacher": logits.tolist(),
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "set")
    data = DataConfig(kind="hf", root=tmp_path / "set", image_size=16, train_limit=6)
    splits = load_data(data)
    chosen = [int(name.rpartition(" ")[2]) for name in image_names(splits.train)]
    teacher = read_outputs(Path(f"{tmp_path / 'set'}:teacher"), 3).fit(splits.train)
    np.testing.assert_array_equal(teacher.stored.row_logits.numpy(), logits[chosen])
    with pytest.raises(DataError, match="no column 'techer'; columns there: image, label, teacher"):
        read_outputs(Path(f"{tmp_path / 'set'}:techer"), 3)
