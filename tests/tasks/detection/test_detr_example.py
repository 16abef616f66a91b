"""RT-DETR of transformers as a plug-in: its losses, boxes and levels, as student and as teacher."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_detectors import batch, plugged_in, two_stage
from torchvision.transforms.v2.functional import resize

import mdistiller
from mdistiller.cli.main import run
from mdistiller.errors import ConfigError
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.detection import models
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.deployment import DetectorDeployment
from mdistiller.tasks.detection.distiller import DetectionDistiller

transformers = pytest.importorskip("transformers", reason="the example's detector is one of transformers")

EXAMPLE = Path(__file__).parents[3] / "examples" / "detr.py"
SIDE = 64
TINY = {"size": SIDE, "queries": 20, "decoder_layers": 2}
LEVELS = {"stride8": (8, 8), "stride16": (16, 4), "stride32": (32, 2)}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with plugged_in(EXAMPLE):
        yield


def detr(seed=0, width=16):
    torch.manual_seed(seed)
    return models.create_detector("rt_detr", 4, width=width, **TINY)


def squares_of(images):
    return torch.stack([resize(image, [SIDE, SIDE], antialias=True) for image in images])


def test_losses_are_those_of_transformers():
    """Labels are made by hand: classes from 0, centres and sizes as fractions of the image."""
    model, (images, targets) = detr().train(), batch()
    x1, y1, x2, y2 = targets[0]["boxes"].numpy().T
    height, width = images[0].shape[1:]
    boxes = np.stack(
        [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1
    )
    none = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    labels = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor(boxes)}, none]
    torch.manual_seed(5)  # of the noise of the denoising queries
    want = model.detr(squares_of(images), labels=labels)
    torch.manual_seed(5)
    got = model(images, targets)
    assert set(got) == {"loss_vfl", "loss_bbox", "loss_giou"}
    torch.testing.assert_close(sum(got.values()), want.loss)
    for kind, value in got.items():
        parts = [v for name, v in want.loss_dict.items() if name.startswith(kind)]
        assert len(parts) == 5  # two layers of the decoder, the encoder's choice, twice the denoising
        torch.testing.assert_close(value, sum(parts))
    # Without an object there is no denoising, and the losses have the same names.
    without = model(images[1:] * 2, targets[1:] * 2)
    assert set(without) == set(got)
    assert without["loss_bbox"] == 0
    assert without["loss_vfl"] > 0


def test_boxes_are_those_of_the_best_queries():
    model, (images, _) = detr().eval(), batch()
    with torch.no_grad():
        # New heads give each query of an image nearly the same box and score.
        for head in model.detr.model.decoder.bbox_embed[-1].layers[-1:]:
            head.weight.normal_(std=0.5)
        model.detr.model.decoder.class_embed[-1].weight.normal_()
        found, out = model(images), model.detr(squares_of(images))
    for i, (height, width) in enumerate([(64, 80), (72, 64)]):
        scores = 1 / (1 + np.exp(-out.logits[i].double().numpy()))
        assert len(found[i]["scores"]) == 20
        order = np.argsort(-scores, axis=None)[:20]
        for rank, (query, kind) in enumerate(zip(*np.unravel_index(order, scores.shape), strict=True)):
            x, y, w, h = out.pred_boxes[i, query].double().tolist()
            box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            box = np.clip(box, 0, [width, height, width, height])
            assert found[i]["scores"][rank].item() == pytest.approx(scores[query, kind], abs=1e-5)
            assert found[i]["labels"][rank] == kind + 1
            assert found[i]["boxes"][rank].numpy() == pytest.approx(box, abs=1e-3)
    assert len({label for f in found for label in f["labels"].tolist()}) > 1


def test_levels_are_the_maps_that_the_decoder_gets():
    model, (images, targets) = detr().eval(), batch()
    adapter = adapter_of(model)
    assert {name: tuple(level) for name, level in adapter.levels.items()} == {
        name: (stride, 16) for name, (stride, _) in LEVELS.items()
    }
    with torch.no_grad():
        prepared = adapter.prepare(images)
        levels = adapter.features(prepared)
        want = model.detr(squares_of(images)).encoder_last_hidden_state
    torch.testing.assert_close(list(levels.values()), list(want))
    assert {name: len(x[0, 0]) for name, x in levels.items()} == {n: side for n, (_, side) in LEVELS.items()}
    model.train()
    _, seen = adapter.train(images, targets)
    assert min(x.std() for x in seen.features.values()) > 0.1  # with transformers' own scales 1e-5
    # In pixels of the square: the first image is 80 wide and 64 high.
    assert seen.objects[0].numpy() == pytest.approx(np.array([[6.4, 8, 32, 40], [24, 20, 59.2, 60]]))
    # Row after row: the second cell of the first map, and the first cell of the second map.
    assert seen.anchors[1][1].tolist() == [12 - 16, 4 - 16, 12 + 16, 4 + 16]
    assert seen.anchors[1][64].tolist() == [8 - 32, 8 - 32, 8 + 32, 8 + 32]
    assert len(seen.anchors[0]) == 64 + 16 + 4


def test_pkd_from_a_faster_rcnn_trains_every_weight():
    teacher = models.create_detector("fasterrcnn_resnet18", 4)
    with pytest.warns(
        UserWarning,
        match=r"stride8 with 1 \(stride 8\), stride16 with 2 \(stride 16\), stride32 with 3 \(stride 32\); "
        r"not compared: the teacher's 0 \(stride 4\), pool \(stride 64\)",
    ):
        distiller = DetectionDistiller(detr(), teacher, "pkd").train()
    before = [{k: v.clone() for k, v in m.named_parameters()} for m in (distiller, teacher)]
    optimizer = torch.optim.AdamW(distiller.parameters(), 1e-3)
    for _ in range(2):
        out = distiller(*batch())
        assert 0 < out.losses["pkd"] < 2
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    after = dict(distiller.named_parameters())
    assert not [k for k, v in before[0].items() if v.requires_grad and torch.equal(v, after[k])]
    assert all(torch.equal(before[1][k], v) for k, v in teacher.named_parameters())


@pytest.mark.parametrize("method", ["pkd", "fgd", "mgd", "fgfi", "fitnet", "reviewkd"])
def test_it_learns_from_another_by_levels(method, recwarn):
    distiller = DetectionDistiller(detr(), detr(1, 32), method).train()
    assert not [w for w in recwarn if "levels compared" in str(w.message)]
    pairs = distiller.asked.taps.items()
    assert [(ours, theirs) for theirs, ours in pairs] == [(name, name) for name in LEVELS]
    out = distiller(*batch())
    losses = [value for name, value in out.losses.items() if name.startswith(method)]
    assert sum(losses) > 0
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


def test_a_faster_rcnn_learns_from_it():
    distiller = DetectionDistiller(two_stage(), detr(), "pkd+fgfi").train()
    assert distiller.asked.taps == dict(zip(LEVELS, ("0", "1", "pool"), strict=True))
    losses = distiller(*batch()).losses
    assert losses["pkd"] > 0
    assert losses["fgfi"] > 0


@pytest.mark.parametrize("method", ["kd", "bckd", "crosskd", "dkd+pkd"])
def test_methods_that_compare_logits_are_refused(method):
    for pair, whose in (((detr(), two_stage()), "student"), ((two_stage(), detr()), "teacher")):
        with pytest.raises(
            ConfigError,
            match=rf"'{method[:3]}\w*' compares logits row by row, and those of the {whose} have no rows in "
            r"common with another detector's \(DetrAdapter.activation is None\); methods that compare levels",
        ):
            DetectionDistiller(*pair, method)
    with pytest.raises(ConfigError, match="Detr: DetrAdapter gives no logits at the rows of another"):
        adapter_of(detr()).class_logits({}, None, None)


def test_a_graph_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="ONNX cannot scale images; export the module `detr`"):
        DetectorDeployment().write_graph(tmp_path / "model.onnx", "onnx", detr(), {})


def test_weights_of_transformers(tmp_path):
    old = detr()
    old.detr.save_pretrained(tmp_path)
    new = models.create_detector("rt_detr", 6, weights=str(tmp_path), size=SIDE)
    theirs, ours = old.state_dict(), new.state_dict()
    assert theirs.keys() == ours.keys()
    other = {name for name, value in ours.items() if value.shape != theirs[name].shape}
    assert all(("score" in name or "class" in name) for name in other)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if name not in other)
    assert len(new.eval()(batch()[0])[0]["scores"]) == 20


def test_a_run_on_the_command_line(squares, tmp_path, capsys):
    plugin = ("--plugin", EXAMPLE)
    flags = ("--data.root", squares, "--data.workers", 0, "--device", "cpu", "--batch-size", 2, *plugin)
    flags += ("--augment.short-sides", 64, "--augment.long-side", 96, "--max-steps", 2)
    flags += ("--optim.name", "adamw", "--optim.lr", 1e-4)
    options = ("--student.options", *(str(word) for pair in TINY.items() for word in pair), "width")
    teacher, student = tmp_path / "teacher", tmp_path / "student"

    def command(*words):
        code = run([*map(str, words)])
        return code, capsys.readouterr()

    assert command("train", "small.teacher.rt_detr", *flags, *options, 32, "--out", teacher)[0] == 0
    given = ("--teacher", teacher, "--out", student)
    assert command("train", "small.pkd.rt_detr", *flags, *options, 16, *given)[0] == 0
    assert "pkd" in read_metrics(student)[0]
    assert json.loads((student / "config.json").read_text())["teacher"]["options"] == TINY | {"width": 32}
    code, said = command(
        "train", "small.kd.rt_detr", *flags, *options, 16, *given[:2], "--out", tmp_path / "kd"
    )
    assert code == 2
    assert "'kd' compares logits row by row" in said.err
    code, said = command("eval", student, "--json")
    assert code == 0
    assert json.loads(said.out)["images"] == 4
    image = next((squares / "images").glob("instances_va*.png"))
    code, said = command("predict", student, image, "--top", 3, *plugin)
    assert code == 0
    assert len([line for line in said.out.splitlines() if "%" in line]) == 3
    page = tmp_path / "report.html"
    assert command("report", teacher, student, "--out", page, *plugin)[0] == 0
    assert "rt_detr" in page.read_text()
    assert len(mdistiller.load_student(student)([torch.rand(3, 50, 70)])[0]["boxes"]) == 20
