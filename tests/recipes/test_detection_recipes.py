"""Detection recipes: the paper's figures, and that every name resolves and comes back from its JSON."""

import json

import pytest

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.recipes.coco import get_detection_recipe, list_detection_recipes
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.training.optim import learning_rate


def test_the_papers_setting():
    config = get_detection_recipe("coco.dkd.fasterrcnn_resnet101_resnet18")
    assert (config.batch_size, config.max_steps, config.optim.lr) == (8, 180_000, 0.01)
    rates = {
        step: learning_rate(config.optim, step, 180_000) for step in (0, 1000, 119_999, 120_000, 160_000)
    }
    assert rates == pytest.approx(
        {0: 1e-5, 1000: 0.01, 119_999: 0.01, 120_000: 1e-3, 160_000: 1e-4}, rel=0.01
    )
    assert config.augment.short_sides == (640, 672, 704, 736, 768, 800)
    assert config.augment.long_side == 1333
    assert (config.method.alpha, config.method.beta, config.method.temperature) == (1.0, 0.25, 1.0)
    assert config.student.name == "fasterrcnn_resnet18"
    assert config.teacher.name == "fasterrcnn_resnet101"
    # 117,266 images of COCO's train2017 have objects: the epochs must not end before the steps.
    assert config.epochs * 117_266 / 8 > config.max_steps


@pytest.mark.parametrize(
    ("pair", "weight"),
    [
        ("fasterrcnn_resnet101_resnet50", 1.0),
        ("fasterrcnn_resnet101_resnet18", 1.2),
        ("fasterrcnn_resnet50_mobilenet_v2", 2.0),
        ("maskrcnn_resnet101_resnet18", 1.5),
        ("fasterrcnn_resnet50_resnet34", 1.0),
    ],
)
def test_the_weight_of_reviewkd(pair, weight):
    assert get_detection_recipe(f"coco.reviewkd.{pair}").method.weight == weight
    both = get_detection_recipe(f"coco.dkd+reviewkd.{pair}").method
    assert (both.reviewkd.weight, both.dkd.beta, both.dkd_weight) == (weight, 0.25, 1.0)


def test_mask_rcnn_reads_masks():
    assert get_detection_recipe("small.student.maskrcnn_resnet18").data.masks
    assert not get_detection_recipe("small.student.fasterrcnn_resnet18").data.masks


def test_every_listed_name_comes_back_from_its_json():
    names = list_detection_recipes()
    assert len(names) == len(set(names))
    for name in names:
        config = get_detection_recipe(name)
        again = DetectionConfig.model_validate(json.loads(config.model_dump_json()))
        assert again == config
        assert again.recipe == name


def test_what_is_refused():
    with pytest.raises(UnknownNameError, match="nearest: fasterrcnn_resnet18"):
        get_detection_recipe("coco.student.fasterrcnn_resnet19")
    with pytest.raises(UnknownNameError, match="method for detectors 'crd'"):
        get_detection_recipe("coco.crd.fasterrcnn_resnet101_resnet18")
    with pytest.raises(UnknownNameError, match="pair of detectors"):
        get_detection_recipe("coco.dkd.fasterrcnn_resnet101")
    with pytest.raises(ConfigError, match="takes no teacher"):
        get_detection_recipe("coco.none.fasterrcnn_resnet101_resnet18")
    with pytest.raises(ConfigError, match="a detection recipe is"):
        get_detection_recipe("coco.dkd")
    with pytest.raises(UnknownNameError, match="detection recipe"):
        get_detection_recipe("cifar100.dkd.x")
    config = get_detection_recipe("small.dkd.fasterrcnn_resnet50_resnet18").model_dump()
    for change, message in (
        ({"compile": True}, "compile: not for detectors"),
        ({"optim": config["optim"] | {"accumulate": 2}}, "neither dot_delta nor accumulate"),
        ({"teacher": {"name": "self"}, "ema": 0.9}, "does not learn from its own average"),
        ({"augment": {"short_sides": []}}, "short_sides are lengths"),
        ({"method": {"name": "crd"}}, "method for detectors"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectionConfig.model_validate(config | change)
