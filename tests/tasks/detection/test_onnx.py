"""ONNX graphs of detectors in ONNX Runtime, on images of other sizes than the one they were traced with."""

import numpy as np
import pytest
import torch
from tiny_detectors import fcos, one_stage, two_stage

from mdistiller.tasks.detection.deployment import DetectorDeployment


def spread(make):
    """A detector whose scores differ by more than rounding does."""
    if make is two_stage:
        return make(box_score_thresh=0.0)
    model = make()
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight.mul_(40)
    return model


@pytest.mark.parametrize("make", [two_stage, one_stage, fcos])
def test_the_graph_finds_the_boxes_of_the_detector(make, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = spread(make).eval()
    path = tmp_path / "model.onnx"
    DetectorDeployment().write_graph(path, "onnx", model, {})
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in ((64, 80), (97, 70)):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            (expected,) = model([image])
        boxes, labels, scores = session.run(None, {"image": image.numpy()})
        assert len(scores) == len(expected["scores"]) > 5
        assert np.sort(scores) == pytest.approx(np.sort(expected["scores"].numpy()), abs=1e-5)
        # Equal scores leave the order open.
        ours = sorted(zip(labels.tolist(), boxes.round(2).tolist(), strict=True))
        theirs = sorted(
            zip(expected["labels"].tolist(), expected["boxes"].numpy().round(2).tolist(), strict=True)
        )
        assert [label for label, _ in ours] == [label for label, _ in theirs]
        a, b = (np.array([box for _, box in found]) for found in (ours, theirs))
        distance = np.abs(a[:, None] - b[None]).max(-1)
        assert distance.min(1).max() < 0.05
