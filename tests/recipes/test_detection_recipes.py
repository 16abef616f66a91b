"""Detection recipes: the paper's numbers, and that every name resolves and comes back from its JSON."""

import json

import pytest

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import CRDConfig
from mdistiller.recipes import get_recipe, list_recipes, set_method
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.training.update import learning_rate


def test_the_papers_setting():
    config = get_recipe("coco.dkd.fasterrcnn_resnet101_resnet18")
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
    assert get_recipe(f"coco.reviewkd.{pair}").method.weight == weight
    both = get_recipe(f"coco.dkd+reviewkd.{pair}").method
    assert (both.reviewkd.weight, both.dkd.beta, both.dkd_weight) == (weight, 0.25, 1.0)


def test_small_recipes_measure_the_weight_of_fitnet_and_no_other():
    pair = "fasterrcnn_resnet50_resnet18"
    assert get_recipe(f"small.fitnet.{pair}").method.weight == "auto"
    assert get_recipe("small.fitnet.fasterrcnn_self_resnet18").method.weight != "auto"
    assert get_recipe(f"coco.fitnet.{pair}").method.weight != "auto"
    published = {"cwd": 50, "fgd": 1, "fgfi": 0.01, "mgd": None}
    assert {name: get_recipe(f"small.{name}.{pair}").method.weight for name in published} == published
    for name in ("cwd", "fgd", "fgfi", "mgd", "kd", "pkd", "reviewkd"):
        small, coco = (get_recipe(f"{family}.{name}.{pair}").method for family in ("small", "coco"))
        assert small == coco
    both = set_method(get_recipe(f"small.dkd.{pair}"), "dkd+fitnet").method
    assert (both.fitnet.weight, both.dkd_weight) == ("auto", 1.0)


def test_mask_rcnn_reads_masks():
    assert get_recipe("small.student.maskrcnn_resnet18").data.masks
    assert not get_recipe("small.student.fasterrcnn_resnet18").data.masks


def test_every_listed_name_comes_back_from_its_json():
    names = [name for name in list_recipes() if name.startswith(("coco.", "small."))]
    assert len(names) > 100
    assert len(names) == len(set(names))
    for name in names:
        config = get_recipe(name)
        again = DetectionConfig.model_validate(json.loads(config.model_dump_json()))
        assert again == config
        assert again.recipe == name


def test_what_is_refused():
    with pytest.raises(UnknownNameError, match="nearest: fasterrcnn_resnet18"):
        get_recipe("coco.student.fasterrcnn_resnet19")
    with pytest.raises(UnknownNameError, match="method for detectors 'crd'"):
        get_recipe("coco.crd.fasterrcnn_resnet101_resnet18")
    with pytest.raises(UnknownNameError, match="pair of detectors"):
        get_recipe("coco.dkd.fasterrcnn_resnet101")
    with pytest.raises(ConfigError, match="takes no teacher"):
        get_recipe("coco.none.fasterrcnn_resnet101_resnet18")
    with pytest.raises(ConfigError, match=r"a recipe is coco.METHOD.TEACHER_STUDENT.*coco.dkd.fasterrcnn_"):
        get_recipe("coco.dkd")
    config = get_recipe("small.dkd.fasterrcnn_resnet50_resnet18").model_dump()
    for change, message in (
        ({"compile": "default"}, "compile: a detector runs without torch.compile; allowed: off"),
        ({"diagnostics": True}, r"diagnostics\n.*Extra inputs are not permitted"),  # a field of classifiers
        ({"teacher": {"name": "self"}}, "needs the average's decay"),
        ({"augment": {"short_sides": []}}, r"short_sides\n.*at least 1 item"),
        ({"method": {"name": "crd"}}, "method for detectors"),
        ({"method": CRDConfig()}, "method for detectors"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectionConfig.model_validate(config | change)


def test_a_student_that_learns_from_its_own_average():
    config = get_recipe("small.dkd.fasterrcnn_self_resnet18")
    assert (config.teacher.name, config.student.name, config.ema) == ("self", "fasterrcnn_resnet18", 0.999)


def test_another_method_gets_its_defaults_for_detectors():
    config = set_method(get_recipe("small.dkd.fasterrcnn_resnet50_resnet18"), "kd+fitnet")
    assert config.recipe == "small.kd+fitnet.fasterrcnn_resnet50_resnet18"
    assert (config.method.kd.temperature, config.method.fitnet.relu) == (1.0, False)
