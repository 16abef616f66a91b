"""The commands of docs/embed.md, with small models, one after another."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
from safetensors.torch import save_file
from unlabeled import save_images

from mdistiller.cli.main import run as command

PAGE = (Path(__file__).parents[3] / "docs" / "embed.md").read_text()
VIT = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL = "--epochs 1 --max-steps 2 --batch-size 8 --data.workers 0 --precision float32 --device cpu"


def page_commands():
    section = PAGE.partition("\n## From a folder")[2].partition("\n## ")[0]
    text = "\n".join(re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
    return re.findall(r"^mdistiller (.*)$", text.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_five_commands_lead_from_a_folder_of_images_to_an_exported_classifier(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    save_images(Path("photos/some/where"), 40)
    for split in ("train", "val"):
        for i, name in enumerate(("dark", "light")):
            save_images(Path("labeled", split, name), 8, seed=i, bias=100 * i)
    teacher = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **VIT)
    save_file(teacher.state_dict(), "teacher.safetensors")
    options = " ".join(f"{name} {value}" for name, value in VIT.items())
    lines = page_commands()
    assert [line.split()[0] for line in lines] == ["train", "predict", "train", "eval", "export"]
    for line in lines:
        line = line.replace("resnet18", "resnet10t").replace("img_size 224", options)
        line = line.replace("--teacher.pretrained", "--teacher.checkpoint teacher.safetensors")
        if line.startswith("train"):
            line += f" {SMALL} --data.image-size 28"
        if "finetune" in line:
            line += " --probe-epochs 0"
        assert command(shlex.split(line)) == 0, capsys.readouterr().err
    assert np.load("embeddings.npy").shape == (40, 512)
    assert Path("my-classifier/model.onnx").is_file()
