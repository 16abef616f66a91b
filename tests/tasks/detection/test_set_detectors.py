"""Detectors of transformers: losses, boxes and maps are transformers' own; folders are read as data."""

import json
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_detectors import batch, two_stage
from tiny_sets import LEVELS, SIDE, SQUARE, TINY, spread, tiny_set

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, UnknownNameError
from mdistiller.models import ModelConfig
from mdistiller.tasks.detection import models
from mdistiller.tasks.detection.adapter import float32_coordinates
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.deployment import DetectorDeployment
from mdistiller.tasks.detection.detr_config import resolve
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.layouts import load_detection
from mdistiller.tasks.detection.weights import build_for_data

transformers = pytest.importorskip("transformers", minversion="5")
KINDS = pytest.mark.parametrize("kind", TINY)


def labels_by_hand(images, targets):
    """Classes from 0; centers and sizes as fractions of the image."""
    x1, y1, x2, y2 = targets[0]["boxes"].numpy().T
    height, width = images[0].shape[1:]
    boxes = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    none = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return [{"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor(np.stack(boxes, 1))}, none]


def squares_of(model, images):
    scaled = [
        torch.nn.functional.interpolate(i[None], (SIDE, SIDE), mode="bilinear", antialias=True)
        for i in images
    ]
    return (torch.cat(scaled) - model.mean) / model.std


@KINDS
def test_losses_are_those_of_transformers(kind):
    model, (images, targets) = tiny_set(kind).train(), batch()
    torch.manual_seed(5)  # of dropout, and of the noise of the denoising queries
    squares = squares_of(model, images)
    want = model.detr(squares, labels=labels_by_hand(images, targets))
    torch.manual_seed(5)
    got = model(images, targets)
    torch.testing.assert_close(sum(got.values()), want.loss)
    kinds = {"d_fine": {"vfl", "bbox", "giou", "fgl", "ddf"}, "detr": {"ce", "bbox", "giou"}}
    own = kinds.get(kind, kinds["detr"] if kind == "yolos" else {"vfl", "bbox", "giou"})
    assert set(got) == {f"loss_{name}" for name in own}
    # Without an object the losses have the same names, but for those of the sides of boxes.
    without = model(images[1:] * 2, targets[1:] * 2)
    assert without["loss_bbox"] == 0
    assert set(got) - {"loss_fgl", "loss_ddf"} <= set(without)


@KINDS
def test_boxes_are_those_of_transformers(kind):
    model, (images, _) = spread(tiny_set(kind)).eval(), batch()
    processor = transformers.RTDetrImageProcessor if kind in SQUARE else transformers.DetrImageProcessor
    with torch.no_grad():
        found, out = model(images), model.detr(squares_of(model, images))
    sizes = [image.shape[1:] for image in images]
    wanted = processor().post_process_object_detection(out, threshold=0.0, target_sizes=sizes)
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours["scores"]) == 20
        assert torch.equal(ours["labels"], theirs["labels"] + 1)
        torch.testing.assert_close(ours["scores"], theirs["scores"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-4)
        assert len(set(ours["scores"].tolist())) > 5


@KINDS
def test_levels_are_maps_of_the_encoder(kind):
    model, (images, targets) = tiny_set(kind).eval(), batch()
    adapter = adapter_of(model)
    assert {name: level.stride for name, level in adapter.levels.items()} == LEVELS[kind]
    with torch.no_grad():
        prepared = adapter.prepare(images)
        features = adapter.features(prepared)
        levels = {name: features[name] for name in adapter.levels}
        out = model.detr(prepared.tensors)
    for (name, x), own in zip(levels.items(), adapter.levels.values(), strict=True):
        assert list(x.shape) == [2, own.channels, SIDE // LEVELS[kind][name], SIDE // LEVELS[kind][name]]
    first = next(iter(levels.values()))
    if kind in SQUARE:
        torch.testing.assert_close(list(levels.values()), list(out.encoder_last_hidden_state))
    elif kind == "detr":  # row after row
        torch.testing.assert_close(first[:, :, 1, 0], out.encoder_last_hidden_state[:, 2])
    else:  # after the class token
        torch.testing.assert_close(first[:, :, 1, 0], out.last_hidden_state[:, 1 + 4])
    seen = adapter.train(images, targets)[1] if model.train() else None
    # In pixels of the square: the first image is 80 wide and 64 high.
    assert seen.objects[0].numpy() == pytest.approx(np.array([[6.4, 8, 32, 40], [24, 20, 59.2, 60]]))
    stride = next(iter(LEVELS[kind].values()))
    first, second = (stride * (i + 0.5) for i in (0, 1))
    assert seen.anchors[1][1].tolist() == [
        second - 2 * stride,
        first - 2 * stride,
        second + 2 * stride,
        first + 2 * stride,
    ]


@pytest.mark.parametrize("kind", ["rt_detr", "detr"])
def test_images_are_those_of_transformers_processor(kind):
    sizes = (97, 64), (50, 91)
    whole = [np.random.default_rng(i).integers(0, 256, (*s, 3), np.uint8) for i, s in enumerate(sizes)]
    processor = transformers.RTDetrImageProcessor if kind == "rt_detr" else transformers.DetrImageProcessor
    size = {"height": SIDE, "width": SIDE}
    want = processor(size=size, do_pad=False)(images=whole, return_tensors="pt")["pixel_values"]
    images = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in whole]
    got = adapter_of(tiny_set(kind)).prepare(images)
    assert (got.tensors - want).abs().max() < 1.1 / 255 / 0.22  # theirs are rounded
    assert got.image_sizes == [(SIDE, SIDE)] * 2


@KINDS
def test_the_graph_finds_the_boxes_of_the_detector(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, deployment = spread(tiny_set(kind)).eval(), DetectorDeployment()
    deployment.write_graph(tmp_path / "model.onnx", "onnx", model, {})
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for size in ((64, 80), (97, 70), (130, 40)):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            (want,) = model([image])
        got = list(map(torch.from_numpy, session.run(None, {"image": image.numpy()})))
        difference, _ = deployment.difference(image, got, (want["boxes"], want["labels"], want["scores"]))
        assert len(got[0]) == 20
        assert difference < 1e-4


@pytest.mark.parametrize("kind", ["d_fine", "detr"])
def test_coordinates_stay_in_float32_under_autocast(kind):
    model, (images, _) = spread(tiny_set(kind)).eval(), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), float32_coordinates(model):
        out = adapter_of(model).run(adapter_of(model).prepare(images))
    assert out.pred_boxes.dtype == torch.float32
    assert out.logits.dtype == torch.bfloat16


@KINDS
@pytest.mark.parametrize("method", ["fitnet", "cwd", "fgd", "mgd", "pkd", "fgfi", "reviewkd"])
def test_it_learns_from_its_like_by_levels(kind, method):
    distiller = DetectionDistiller(tiny_set(kind), tiny_set(kind, 1), method).train()
    assert distiller.asked.taps == {name: name for name in LEVELS[kind]}
    out = distiller(*batch())
    assert sum(value for name, value in out.losses.items() if name.startswith(method)) > 0
    out.loss.backward()
    trained = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    fixed = {name.rpartition(".")[2] for name, _ in distiller.named_parameters()} - {
        n.rpartition(".")[2] for n in trained
    }
    assert fixed == ({"up", "reg_scale"} if kind == "d_fine" else set())  # of the bins; all else is trained


def test_it_teaches_and_learns_from_torchvisions():
    teacher = models.create_detector("fasterrcnn_resnet18", 4)
    with pytest.warns(UserWarning, match=r"stride8 with 1 \(stride 8\), stride16 with 2 .* stride32 with 3"):
        distiller = DetectionDistiller(tiny_set("d_fine"), teacher, "pkd").train()
    assert 0 < distiller(*batch()).losses["pkd"] < 2
    distiller = DetectionDistiller(two_stage(), tiny_set("d_fine"), "pkd+fgfi").train()
    assert distiller.asked.taps == dict(zip(LEVELS["d_fine"], ("0", "1", "pool"), strict=True))
    assert distiller(*batch()).losses["pkd"] > 0


@pytest.mark.parametrize("method", ["kd", "bckd", "crosskd", "dkd+pkd"])
def test_methods_that_compare_logits_by_rows_are_refused(method):
    for pair, whose in (
        ((tiny_set("detr"), two_stage()), "student"),
        ((two_stage(), tiny_set("detr")), "teacher"),
    ):
        with pytest.raises(ConfigError, match=rf"those of the {whose} have no rows in common"):
            DetectionDistiller(*pair, method)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("d_fine", {"width": 3}, "unknown option of detector 'transformers/d_fine' 'width'"),
        ("d_fine", {"short_side": 64}, "unknown option of detector"),
        (
            "detr",
            {"backbone_weights": "runs/backbone"},
            "ResNet or MobileNet start from a backbone, such as fcos_resnet18",
        ),
        ("d_fine", {"size": 70}, "size: got 70; allowed: multiples of 32"),
        ("d_fine", {"num_queries": 85}, "num_queries: got 85; allowed with a size of 64: at most 84"),
        ("rt_detr", {"decoder_layers": "many"}, "does not take"),
        (
            "rt_detr",
            {"backbone_config": {"model_type": "swin"}},
            "model_type: got 'swin'; allowed: hgnet_v2, resnet",
        ),
        ("rt_detr", {"weights": "a", "config": "b"}, "got weights and config; allowed: one of them"),
    ],
)
def test_wrong_options(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_set(kind, **options)
    with pytest.raises(UnknownNameError, match="nearest: d_fine"):
        models.create_detector("transformers/dfine", 4)


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.1"))
    with pytest.raises(MissingPackageError, match=r"'transformers/detr' needs transformers 5: pip install"):
        models.create_detector("transformers/detr", 4)


@pytest.fixture
def _no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("opens a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def save(model, folder, names=("blue", "red", "green"), processor=True, **changes):
    """Writes a folder as of the Hub, with classes in another order than the data's."""
    model.detr.config.id2label = dict(enumerate(names))
    model.detr.save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | changes))
    if processor:
        own = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        size = {"height": SIDE, "width": SIDE}
        (folder / "preprocessor_config.json").write_text(json.dumps(own | {"size": size}))
    return str(folder)


@KINDS
@pytest.mark.usefixtures("_no_network")
def test_classes_of_a_folder_are_found_by_their_names(kind, squares, tmp_path):
    """The data has red, green and blue; the folder has blue, red and green."""
    old = spread(tiny_set(kind)).eval()
    folder = save(old, tmp_path / "folder")
    data = load_detection(DetectionDataConfig(root=squares))
    config = ModelConfig(name=f"transformers/{kind}", options={"weights": folder})
    with pytest.warns(UserWarning, match="its classes were put into the data's order"):
        new = build_for_data(config, data, new=False).eval()
    assert (new.size, new.mean.flatten().tolist()) == (SIDE, pytest.approx([0.1, 0.2, 0.3]))
    images, _ = batch()
    with torch.no_grad():
        out, want = (m.detr(squares_of(new, images)) for m in (new, old))
    torch.testing.assert_close(out.pred_boxes, want.pred_boxes)
    torch.testing.assert_close(out.logits[..., :3], want.logits[..., [1, 2, 0]])
    torch.testing.assert_close(out.logits[..., 3:], want.logits[..., 3:])


@pytest.mark.usefixtures("_no_network")
def test_classes_that_a_folder_lacks(squares, tmp_path):
    old = spread(tiny_set("d_fine", classes=3)).eval()
    data = load_detection(DetectionDataConfig(root=squares))
    for names, said in (
        (("blue", "cat"), "'red', 'green'"),
        (("LABEL_0", "LABEL_1"), "'red', 'green', 'blue'"),
    ):
        folder = save(old, tmp_path / names[0], names)
        config = ModelConfig(name="transformers/d_fine", options={"weights": folder})
        with pytest.raises(ConfigError, match=f"teacher.options: .* has no class {said} of the data"):
            build_for_data(config, data, new=False)
        with pytest.warns(UserWarning, match=f"has no class {said}: their outputs start"):
            new = build_for_data(config, data, new=True).eval()
    theirs, ours = old.detr.state_dict(), new.detr.state_dict()
    different = {key for key in ours if ours[key].shape != theirs[key].shape}
    assert {key.split(".")[-2].rstrip("0123456789") for key in different} <= {
        "enc_score_head",
        "denoising_class_embed",
        "",
    }
    assert all(torch.equal(theirs[key], ours[key]) for key in ours.keys() - different)


@pytest.mark.usefixtures("_no_network")
def test_a_folder_runs_no_code_and_fetches_nothing(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    changes = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForObjectDetection": "evil.Model"},
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "use_pretrained_backbone": True,
        "dtype": "float16",
    }
    folder = save(tiny_set("d_fine"), tmp_path / "folder", **changes)
    (tmp_path / "folder" / "evil.py").write_text((tmp_path / "evil.py").read_text())
    model = models.create_detector("transformers/d_fine", 4, weights=folder)
    assert model.detr.config._attn_implementation == "sdpa"
    assert next(model.parameters()).dtype == torch.float32
    assert not (tmp_path / "ran").exists()
    for backbone in ("hf-hub:someone/model", "local-dir:/tmp", "someone/model"):
        wrong = {"model_type": "timm_backbone", "backbone": backbone}
        folder = save(tiny_set("d_fine"), tmp_path / "folder", backbone_config=wrong)
        with pytest.raises(UnknownNameError, match="unknown timm model"):
            models.create_detector("transformers/d_fine", 4, config=folder)
    # As facebook/detr-resnet-50 has it: timm's network, whose weights are the folder's.
    pytest.importorskip("timm")
    legacy = {
        "backbone_config": None,
        "backbone": "resnet18",
        "use_timm_backbone": True,
        "use_pretrained_backbone": True,
    }
    folder = save(tiny_set("detr"), tmp_path / "detr", **legacy)
    made = models.create_detector("transformers/detr", 4, config=folder)
    assert made.detr.config.backbone_config.backbone == "resnet18"


@pytest.mark.usefixtures("_no_network")
def test_damaged_and_incomplete_folders(tmp_path):
    def build(kind="d_fine", **options):
        return models.create_detector(f"transformers/{kind}", 4, weights=folder, **options)

    folder = save(tiny_set("d_fine"), tmp_path / "folder", processor=False)
    with pytest.raises(
        ConfigError, match=r"preprocessor_config.json gives no size of squares: give it as an option"
    ):
        build()
    build(size=64, mean=[0.0] * 3, std=[1.0] * 3)
    with pytest.raises(ConfigError, match="holds a 'd_fine'; you asked for 'transformers/rt_detr'"):
        build("rt_detr")
    folder = save(tiny_set("d_fine", classes=7), tmp_path / "folder", names=tuple("abcdef"))
    with pytest.raises(
        CheckpointError, match="belongs to another architecture than its config, or to other classes"
    ):
        build()
    processor = tmp_path / "folder" / "preprocessor_config.json"
    own = json.loads(processor.read_text())
    for change, message in (
        ({"size": {"height": 64, "width": 32}}, "no size of squares"),
        ({"do_rescale": False}, "do_rescale"),
    ):
        processor.write_text(json.dumps(own | change))
        with pytest.raises(ConfigError, match=message):
            build()
    processor.unlink()
    stated = {"size": 64, "mean": [0.0] * 3, "std": [1.0] * 3}
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "folder" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no weights in the format safetensors"):
        build(**stated)
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: JSONDecodeError"):
        build(**stated)


def test_the_options_of_a_trained_detector_need_no_folder(tmp_path):
    folder = save(tiny_set("detr"), tmp_path / "folder")
    found = resolve("detr", {"weights": folder, "num_queries": 7})
    assert (found["num_queries"], found["size"], found["d_model"]) == (7, SIDE, 16)
    assert not {"weights", "id2label"} & found.keys()
    assert resolve("detr", json.loads(json.dumps(found))) == json.loads(json.dumps(found))
    assert resolve("rt_detr", {})["size"] == 640
