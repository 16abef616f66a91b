"""Runs without labels: data of every form, teachers of every library, methods, metrics and results."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from processes import run_group
from safetensors.torch import load_file, save_file
from small_runs import SETTINGS, VIT, StopAfter, run_card
from unlabeled import save_images, small

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.data import load_data
from mdistiller.errors import ConfigError, DataError, Interrupted
from mdistiller.methods import get_method, list_methods
from mdistiller.models import ModelConfig
from mdistiller.recipes import get_recipe
from mdistiller.recipes.family import _FAMILIES, find_family
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.embed.config import EmbedConfig, EmbedData, suits
from mdistiller.training.launch import train

METHODS = [name for name in list_methods() if suits(get_method(name))]


def distill(student, teacher, data, out, method=None, **settings):
    settings = {**SETTINGS, **settings}
    return mdistiller.distill(student, teacher, data, method, task="embed", out=out, **settings)


# Data


def sizes(**fields):
    splits = load_data(EmbedData(**{"kind": "folder", "image_size": 32, "workers": 0, **fields}))
    assert splits.classes == ()
    assert set(splits.train.labels.tolist()) == {-100}
    return len(splits.train), len(splits.test)


def test_every_image_below_a_folder_and_a_tenth_is_held_out(images):
    assert sizes(root=images) == (36, 4)
    assert sizes(root=images, val_fraction=0.5) == (20, 20)
    assert sizes(root=images, train_limit=10, test_limit=3) == (10, 3)


def test_the_validation_split_of_a_folder_is_held_out(tmp_path):
    save_images(tmp_path / "train" / "cat", 9)
    save_images(tmp_path / "val" / "cat", 5)
    assert sizes(root=tmp_path) == (9, 5)
    assert sizes(root=tmp_path / "train") == (8, 1)


def test_a_list_without_labels(images):
    rows = [str(path.relative_to(images)) for path in sorted((images / "some").glob("*.png"))]
    file = images / "list.csv"
    file.write_text("\n".join(["path", *rows]))
    assert sizes(root=file) == (22, 2)
    file.write_text("\n".join(["path,label", *(f"{row},cat" for row in rows[:10])]))
    assert sizes(root=file) == (9, 1)
    file.unlink()


def test_a_hugging_face_set_without_a_label_column(tmp_path, images):
    datasets = pytest.importorskip("datasets")
    paths = [str(path) for path in sorted((images / "some").glob("*.png"))]
    rows = datasets.Dataset.from_dict({"picture": paths}).cast_column("picture", datasets.Image())
    rows.save_to_disk(str(tmp_path / "set"))
    assert sizes(kind="hf", root=tmp_path / "set") == (22, 2)


def test_a_registered_set_loses_its_labels():
    assert sizes(kind="synthetic", synthetic_samples=20) == (20, 10)


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"has no images, which end in \.jpg"):
        sizes(root=tmp_path)
    with pytest.raises(DataError, match="is neither a folder nor a list of paths"):
        sizes(root=tmp_path / "nothing")


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        return Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def test_a_dataset_of_images_alone(tmp_path, vit):
    run = distill("resnet8", vit, Pictures(), tmp_path / "run")
    assert run.metrics[-2]["loss"] > 0
    assert run.config.data.val_fraction == 0.1
    with pytest.raises(ConfigError, match="without a test set"):
        mdistiller.distill("resnet8", vit, Pictures(), out=tmp_path / "no")


def test_sixteen_bits_become_eight(tmp_path):
    """The high bytes of 16-bit grayscale files train the same student."""
    for name, dtype in (("deep", np.uint16), ("flat", np.uint8)):
        (tmp_path / name).mkdir()
        for i in range(30):
            pixels = np.random.default_rng(i).integers(0, 2**16, (32, 32), dtype=np.uint16)
            Image.fromarray((pixels >> 16 - 8 * dtype().nbytes).astype(dtype)).save(
                tmp_path / name / f"{i}.png"
            )
        torch.manual_seed(0)
        teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
        distill("resnet8", teacher, small(tmp_path / name), tmp_path / f"{name}-run")
    assert_same(tmp_path / "deep-run", tmp_path / "flat-run")


@pytest.mark.parametrize("shape", [(6, 32, 32), (2, 32, 32)])
def test_other_numbers_of_channels_are_one_error(tmp_path, vit, shape):
    bands = [torch.zeros(shape, dtype=torch.uint8) for _ in range(30)]
    with pytest.raises(
        ConfigError, match=r"train\[0\] is a tensor \[\d, 32, 32\]; allowed: .* \[3, H, W\] or \[1,"
    ):
        distill("resnet8", vit, Bands(bands), tmp_path / "run")


class Bands(Pictures):
    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        return self.images[i]


# Teachers


def vit_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, patch_size=8))


def siglip():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
    sizes |= {"intermediate_size": 64, "patch_size": 8}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 8, 8), torch.nn.ReLU())

    def forward(self, image):
        return self.body(image).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: timm.create_model("resnet10t", num_classes=0), {}),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT), {}),
        (lambda: torchvision.models.resnet18(), {}),
        (vit_of_transformers, {}),
        (siglip, {}),
        (Own, {"student_taps": ("stage3",), "teacher_taps": ("body",)}),
    ],
)
def test_teachers_of_every_library(tmp_path, images, make, fields):
    torch.manual_seed(0)
    method = {"name": "tokens", **fields}
    run = distill("resnet8", make(), small(images), tmp_path / "run", method)
    window = run.metrics[0]
    assert window["tokens_patch"] > 0
    assert window["tokens_global"] > 0


@pytest.mark.parametrize("method", ["tokens", "fitnet"])
def test_evaluations_run_in_the_precision_of_the_training(tmp_path, images, method, vit):
    run = distill("resnet8", vit, small(images), tmp_path / "run", method, precision="bfloat16")
    same = distill("resnet8", vit, small(images), tmp_path / "same", method)
    exact = same.summary["last"]["loss"]
    assert run.summary["last"]["loss"] == pytest.approx(exact, rel=0.1)


def test_a_teacher_has_its_own_images(tmp_path, images):
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT | {"img_size": 48})
    own = {"image_size": 48, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    run = distill("resnet8", teacher, small(images), tmp_path / "run", teacher_input=own)
    assert run.config.teacher.image_size == 48
    with pytest.raises(ConfigError, match="cannot run on images of shape"):
        distill("resnet8", teacher, small(images), tmp_path / "no")


def test_a_teacher_without_patches_is_refused_for_the_patch_loss(tmp_path, images):
    with pytest.raises(ConfigError, match="Own has no tap named stageN"):
        distill("resnet8", Own(), small(images), tmp_path / "no")
    run = distill("resnet8", Own(), small(images), tmp_path / "run", {"name": "tokens", "patch_weight": 0.0})
    assert set(run.metrics[0]) & {"tokens_patch", "tokens_global"} == {"tokens_global"}


def test_a_teacher_without_an_embedding_is_refused(tmp_path, images, vit):
    vit.global_pool = ""
    with pytest.raises(mdistiller.errors.TapError, match="without an embedding"):
        distill("resnet8", vit, small(images), tmp_path / "no")


# Methods


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_features_work(tmp_path, images, name):
    teacher = mdistiller.create_model("resnet14", 4)
    run = distill("resnet8", teacher, small(images), tmp_path / "run", name)
    line = run.metrics[-2]
    assert np.isfinite([line["loss"], line["agreement"]]).all()
    assert "task" not in line["train"]


@pytest.mark.parametrize("name", ["dkd", "crd", "simkd", "mlkd", "fitnet+dkd"])
def test_methods_of_labels_or_logits_are_refused(tmp_path, images, vit, name):
    with pytest.raises(ConfigError, match="reads labels or logits, and task embed has neither"):
        distill("resnet8", vit, small(images), tmp_path / "no", name)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.1},
        {"probe_epochs": 1},
        {"augment": {"mixup_alpha": 0.2}},
        {"optim": {"name": "dot"}},
        {"diagnostics": True},
        {"method": {"name": "fitnet", "weight": "auto"}},
    ],
)
def test_settings_about_labels_are_refused(settings):
    config = get_recipe("embed.tokens.resnet8", teacher="resnet14")
    with pytest.raises(ConfigError, match=r"task embed (is|has no task loss)"):
        config.replace(**settings)


def test_a_run_without_a_teacher_is_refused(images):
    with pytest.raises(ConfigError, match="task embed learns from a teacher"):
        mdistiller.train("embed.student.resnet8", data=small(images), **SETTINGS)


def test_every_method_has_a_recipe():
    recipes = mdistiller.list_recipes()
    assert {f"embed.{name}.timm/vit_small_patch14_dinov2_timm/resnet18" for name in METHODS} <= {*recipes}
    config = get_recipe("embed.tokens.timm/resnet18", teacher="timm/vit_small_patch14_dinov2")
    assert isinstance(config, EmbedConfig)
    assert config.method.task_weight == 0


# Metrics and results


@pytest.fixture(scope="module")
def run(images, labeled, tmp_path_factory):
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    data = small(images, probe=labeled)
    return distill("timm/resnet10t", teacher, data, tmp_path_factory.mktemp("run") / "run", max_steps=8)


def test_an_evaluation_probes_labeled_images(run, images, vit, tmp_path):
    line = run.metrics[-2]
    assert {"agreement", "loss", "knn", "linear"} <= {*line}
    assert line["knn"] > 50  # dark and light
    with pytest.raises(DataError, match=r"data\.probe: .* is neither a folder nor a list"):
        distill("resnet8", vit, small(images, probe=tmp_path / "nothing"), tmp_path / "no")


def assert_same(first, second):
    """Bit for bit."""
    one, other = (load_file(folder / "student.safetensors") for folder in (first, second))
    assert all(value.equal(other[key]) for key, value in one.items())


def test_a_repeated_run_and_a_resumed_one_have_the_same_bits(images, tmp_path):
    def start(name, **changes):
        torch.manual_seed(0)
        teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
        method = {"name": "tokens", "standardize": True, "patch_loss": {"l2": 1.0}}
        settings = {"epochs": 2, "max_steps": 10, "augment": {"flip": True}, **changes}
        return distill("resnet8", teacher, small(images), tmp_path / name, method, **settings)

    whole = start("whole")
    start("again")
    assert_same(tmp_path / "whole", tmp_path / "again")
    with pytest.raises(Interrupted, match="SIGTERM after step 7"):
        start("cut", reporter=StopAfter(7))
    resumed = start("cut", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert resumed.metrics[-2]["loss"] == whole.metrics[-2]["loss"]


def two_processes(images, teacher, out):
    config = get_recipe("embed.tokens.timm/vit_tiny_patch16_224", teacher=ModelConfig(**teacher))
    student = {"options": {**VIT, "embed_dim": 24}}  # no batch norm, whose statistics are a process's
    optim = {"name": "sgd", "lr": 0.1, "lr_warmup": 0.0, "weight_decay": 0.0}
    train(config.replace(student=student, optim=optim, data=small(images), out=out, **SETTINGS))


def test_two_processes_train_as_one(images, tmp_path, vit):
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    teacher = {
        "name": "timm/vit_tiny_patch16_224",
        "options": VIT,
        "checkpoint": tmp_path / "vit.safetensors",
    }
    codes, _, errors = run_group(two_processes, images, teacher, tmp_path / "two")
    assert codes == [0, 0], errors
    two_processes(images, teacher, tmp_path / "one")
    two, one = ([*read_metrics(tmp_path / name)] for name in ("two", "one"))
    for name in ("tokens_patch", "tokens_global", "loss"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4)
    assert two[-2]["agreement"] == pytest.approx(one[-2]["agreement"], abs=5)
    states = [load_file(tmp_path / name / "student.safetensors") for name in ("two", "one")]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_timm_and_torchvision_load_the_student(run, images, vit, tmp_path):
    found = timm.create_model("resnet10t", num_classes=0)
    found.load_state_dict(load_file(run.path / "student.safetensors"))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.eval()(image), run.student(image))
    other = distill("torchvision/resnet18", vit, small(images), tmp_path / "run")
    found = torchvision.models.resnet18()
    keys = found.load_state_dict(load_file(other.path / "student.safetensors"), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])


def test_a_classifier_and_the_next_embedding_start_from_it(run, labeled, images, tmp_path):
    start = {"name": "timm/resnet10t", "checkpoint": run.path}
    data = small(labeled, val_fraction=0.2)
    with pytest.warns(UserWarning, match="no classifier: a new one"):
        tuned = mdistiller.train(
            "folder.finetune.timm/resnet10t",
            student=start,
            data=data,
            out=tmp_path / "tuned",
            probe_epochs=0,
            **SETTINGS,
        )
    assert tuned.student(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    teacher = mdistiller.distill("resnet8", run, small(images), task="embed", out=tmp_path / "2", **SETTINGS)
    assert teacher.config.teacher.checkpoint == run.path


def test_no_recipe_is_asked_for_a_model_that_is_none(run, images, tmp_path, monkeypatch):
    family, asked = find_family("embed"), []
    monkeypatch.setitem(
        _FAMILIES, "embed", replace(family, baseline=lambda name: asked.append(name) or family.baseline(name))
    )
    distill("resnet8", run, small(images), tmp_path / "run")
    assert set(asked) == {"resnet8"}


@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_an_export_gives_embeddings(run, images, tmp_path, format):
    with pytest.warns(UserWarning, match="not measured"):
        folder = run.export(format, out=tmp_path / "export")
    card = json.loads((folder / "card.json").read_text())
    assert card["classes"] == []
    assert "| output | embeddings" in (folder / "README.md").read_text()
    file = tmp_path / "found.npy"
    assert command(["predict", str(folder), str(images / "some"), "--out", str(file)]) == 0
    assert np.load(file).shape == (24, 512)
    names, printed, path = run_card(folder, tmp_path, (40, 40))
    expected = mdistiller.load_export(folder, "cpu").outputs([path])
    if format == "safetensors":
        assert printed == f"{expected}\n"
    else:
        np.testing.assert_allclose(names["embedding"], expected, atol=0.02)
        assert printed == f"{names['embedding'][0]}\n"


def test_predict_writes_embeddings_in_the_order_that_it_prints(run, images, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("npy", "parquet"):
        assert command(["predict", str(run.path), str(images), "--out", str(tmp_path / f"x.{suffix}")]) == 0
    printed = capsys.readouterr().out.split()
    rows = np.load(tmp_path / "x.npy")
    found = parquet.read_table(tmp_path / "x.parquet")
    assert str(found.schema.field("output").type.value_type) == "float"  # of 32 bits
    table = found.to_pydict()
    assert printed == 2 * table["path"]
    np.testing.assert_array_equal(np.array(table["output"], dtype=np.float32), rows)
    from mdistiller.deploy.predict import load_predictor

    predictor = load_predictor(run.path)
    with Image.open(table["path"][3]) as image:
        single = predictor(predictor.prepare(image.convert("RGB"))[None])[0]
    np.testing.assert_allclose(rows[3], single.numpy(), rtol=1e-4, atol=1e-5)
    for words, message in (([], "give --out FILE.npy"), (["--out", "x.txt"], "allowed: FILE.npy")):
        assert command(["predict", str(run.path), str(images), *words]) == 2
        assert message in capsys.readouterr().err


def test_the_command_line(images, tmp_path):
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT).state_dict(), file)
    options = [str(word) for pair in VIT.items() for word in pair]
    words = ["train", "embed.tokens.timm/resnet10t", "--data.root", images, "--data.image-size", "32"]
    words += ["--teacher", "timm/vit_tiny_patch16_224", "--teacher.options", *options]
    words += ["--teacher.checkpoint", file, "--method.patch-loss", "cosine", "0.9", "smooth_l1", "0.1"]
    words += ["--max-steps", "2", "--batch-size", "8", "--device", "cpu", "--data.workers", "0"]
    words += ["--precision", "float32", "--out", tmp_path / "run"]
    assert command(list(map(str, words))) == 0
    assert mdistiller.Run(tmp_path / "run").config.method.patch_loss == {"cosine": 0.9, "smooth_l1": 0.1}
    assert command(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_the_cache_holds_token_maps_and_changes_no_bit_when_it_is_read(images, tmp_path, form):
    states, files = [], []
    settings = {"teacher_cache": tmp_path / "cache", "teacher_cache_taps": ("norm",), "teacher_views": 1}
    settings["teacher_cache_format"] = form
    for name in ("1", "2"):
        torch.manual_seed(0)
        teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
        run = distill("resnet8", teacher, small(images), tmp_path / name, max_steps=5, **settings)
        states.append(load_file(run.path / "student.safetensors"))
        files.append({file: file.read_bytes() for file in (tmp_path / "cache").glob("*.rows")})
    assert all(value.equal(states[1][key]) for key, value in states[0].items())
    assert files[0] == files[1]
    # 48 halves; 17 tokens of 48 halves, or 17 and two numbers for each of 48 channels.
    found = {file.stat().st_size // 36 // 100 for file in files[0]}
    assert found == {1, 16 if form == "fp16" else 12}
    live = distill("resnet8", teacher, small(images), tmp_path / "live", max_steps=1)
    for name in ("tokens_patch", "tokens_global"):
        assert run.metrics[0][name] == pytest.approx(live.metrics[0][name], rel=2e-3)
