"""Each method trains; the teacher stays; two processes give the gradients of one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from tiny_detectors import (
    CLASSES,
    batch,
    fcos,
    group_norm,
    loader,
    one_stage,
    read_coco,
    ssd,
    two_stage,
    write_set,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mdistiller.errors import ConfigError
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.evaluate import evaluate_detector
from mdistiller.tasks.detection.methods import build_method, default_config
from mdistiller.training.distributed import World

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
TWO_STAGE = ["none", "kd", "dkd", "fitnet", "fgfi", "reviewkd", "dkd+reviewkd"]
ONE_STAGE = ["none", "bckd", "fitnet", "fgfi", "reviewkd", "bckd+reviewkd"]
CASES = [
    *[("faster", m) for m in TWO_STAGE],
    *[("mask", m) for m in ("none", "dkd", "dkd+reviewkd")],
    *[("retina", m) for m in ONE_STAGE],
    *[("fcos", m) for m in ("none", "bckd", "bckd+fgfi")],
    *[("ssd", m) for m in ("none", "kd", "fitnet")],
]
MAKE = {
    "faster": two_stage,
    "mask": lambda **kw: two_stage(masks=True, **kw),
    "retina": one_stage,
    "fcos": fcos,
    "ssd": ssd,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    return read_coco(write_set(folder, 6), folder / "images", masks=True)


def batches(images, count):
    own = loader(images, 3, training=True, short_sides=(56, 64), long_side=96)
    epoch = 0
    while count > 0:
        for one in own.epoch(epoch):
            if count > 0:
                yield one
            count -= 1
        epoch += 1


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def fit(distiller, images, steps):
    """Train; the losses of every step by name."""
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(0)
    history = []
    for one in batches(images, steps):
        out = distiller(one.image, one.target)
        optimizer.zero_grad()
        out.loss.backward()
        if not history:
            assert [n for n, p in distiller.named_parameters() if p.grad is None] == []
        nn.utils.clip_grad_norm_(distiller.parameters(), 5.0)
        optimizer.step()
        history.append({name: value.item() for name, value in out.losses.items()})
    return history


@pytest.fixture(scope="module")
def teachers(images):
    """A detector of each kind, trained for some steps."""
    made = {}
    for kind, make in MAKE.items():
        made[kind] = make(seed=1, width=16)
        fit(DetectionDistiller(made[kind], None, "none"), images, 40)
    return made


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_few_steps_on_images(images, teachers, kind, method):
    """Losses fall, each in turn; all that trains has a gradient; the teacher stays bit for bit."""
    teacher = teachers[kind]
    before = snapshot(teacher)
    distiller = DetectionDistiller(MAKE[kind](), None if method == "none" else teacher, method)
    history = fit(distiller, images, 24)
    start, end = (
        {name: sum(step[name] for step in part) / len(part) for name in history[0]}
        for part in (history[:4], history[-6:])
    )
    assert sum(end.values()) < 0.8 * sum(start.values())
    for name in () if "+" in method else (method,):  # a sum may favor one of its parts
        if name != "none":
            assert end[name] < 0.8 * start[name], f"{name}: {start[name]} to {end[name]}"
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("method", TWO_STAGE)
def test_a_few_dozen_steps_on_photographs(method):
    """Real images, made small."""
    folder = SHARED / "voc07-mini"
    if not folder.is_dir():
        pytest.skip("no data set in ../shared/data/voc07-mini")
    photographs = read_coco(folder / "instances_train.json", folder / "images", limit=6, keep_empty=False)
    teacher = two_stage(seed=1, width=16, classes=21)
    fit(DetectionDistiller(teacher, None, "none"), photographs, 40)
    distiller = DetectionDistiller(two_stage(classes=21), None if method == "none" else teacher, method)
    totals = [sum(losses.values()) for losses in fit(distiller, photographs, 36)]
    assert sum(totals[-6:]) < 0.8 * sum(totals[:6])


def test_keypoint_rcnn_learns_from_faster_rcnn():
    images, targets = batch()
    for target in targets:  # in the middle of each object
        points = target["boxes"].unflatten(1, (2, 2)).mean(1)[:, None].repeat(1, 5, 1)
        target["keypoints"] = torch.cat([points, torch.ones_like(points[..., :1])], 2)
    distiller = DetectionDistiller(two_stage(keypoints=5), two_stage(seed=1), "dkd+pkd").train()
    out = distiller(images, targets)
    assert {"loss_keypoint", "loss_classifier", "dkd", "pkd"} <= out.losses.keys()
    out.loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())


@pytest.mark.parametrize("kind", MAKE)
def test_images_without_any_object(kind):
    images, targets = batch(masks=True)
    nothing = {key: value[:0] for key, value in targets[0].items()}
    method = "bckd+fgfi" if kind in ("retina", "fcos") else "dkd+fgfi"
    distiller = DetectionDistiller(MAKE[kind](), MAKE[kind](seed=1), method).train()
    losses = distiller(images, [nothing, targets[1]]).losses
    assert all(value.isfinite() for value in losses.values())
    assert losses["fgfi"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())  # or DDP would wait for it


def test_bfloat16():
    distiller = DetectionDistiller(two_stage(masks=True), two_stage(seed=1), "dkd+reviewkd+fgfi").train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(*batch(masks=True)).losses
    assert losses["dkd"].dtype == losses["fgfi"].dtype == torch.float32
    sum(value.float() for value in losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.parameters())


def test_a_detector_is_not_its_own_teacher():
    detector = two_stage()
    with pytest.raises(ConfigError, match="share parameters"):
        DetectionDistiller(detector, detector, "kd")
    assert all(p.requires_grad for p in detector.parameters())


def test_the_teacher_moves_along_but_is_no_part_of_the_distiller():
    distiller = DetectionDistiller(two_stage(), two_stage(seed=1), "kd")
    distiller.double()
    assert distiller.teacher.backbone.body.stem[0].weight.dtype == torch.float64
    assert len(list(distiller.parameters())) == len(list(two_stage().parameters()))


def test_the_output_and_settings_by_name():
    torch.manual_seed(0)
    outs = []
    for settings in ({}, {"alpha": 0.0, "beta": 0.0}):
        distiller = DetectionDistiller(two_stage(), two_stage(seed=1), "dkd", **settings).train()
        torch.manual_seed(0)
        outs.append(distiller(*batch()))
    (full, none) = outs
    torch.testing.assert_close(full.loss, torch.stack(list(full.losses.values())).sum())
    assert full.losses["dkd"] > 0 == none.losses["dkd"]
    assert full.logits.shape[1] == CLASSES
    assert torch.equal(full.logits, none.logits)
    with pytest.raises(ConfigError, match="settings go with a method's name"):
        DetectionDistiller(two_stage(), two_stage(seed=1), default_config("dkd"), beta=1.0)
    with pytest.raises(ConfigError, match="nearest: beta"):
        DetectionDistiller(two_stage(), two_stage(seed=1), "dkd", betta=1.0)


def test_a_schedule_needs_the_progress_of_training():
    def make(**options):
        return DetectionDistiller(two_stage(), two_stage(seed=1), "dkd", warmup=0.5, **options).train()

    with pytest.raises(ConfigError, match=r"'dkd' has a schedule.*total_steps=N.*progress="):
        make()(*batch())
    counted, given = make(total_steps=4), make()
    for step in range(4):
        losses = []
        for distiller, options in ((counted, {}), (given, {"progress": step / 4})):
            torch.manual_seed(step)
            losses.append(distiller(*batch(), **options).losses["dkd"].item())
        assert losses[0] == losses[1]
        assert (losses[0] == 0) == (step == 0)


def test_models_that_are_handed_over_stay_as_they_are():
    """Their class, modes, requires_grad and hooks; the teacher its weights and buffers as well."""
    models = two_stage(), two_stage(seed=1).train()
    models[0].backbone.requires_grad_(False)

    def state(model):
        return [
            (type(m), m.training, len(m._forward_hooks), [p.requires_grad for p in m.parameters(False)])
            for m in model.modules()
        ]

    before, weights = [state(m) for m in models], snapshot(models[1])
    distiller = DetectionDistiller(*models, "dkd+fitnet")
    assert [state(m) for m in models] == before
    distiller(*batch()).loss.backward()
    assert [state(m) for m in models] == before
    assert (distiller.student, distiller.teacher) == models
    assert all(torch.equal(value, weights[key]) for key, value in models[1].state_dict().items())
    assert all(p.grad is None for p in models[1].parameters())


DISTRIBUTED = [
    ("faster", "dkd+fgfi"),
    ("faster", "reviewkd"),
    ("mask", "kd+fitnet"),
    ("retina", "bckd+reviewkd"),
]


def gradients(kind, method, ranks, ddp=False):
    """The mean of the ranks' gradients, each of its own image, with the same proposals sampled."""
    student, teacher = group_norm(MAKE[kind]()), group_norm(MAKE[kind](seed=1))
    torch.manual_seed(4)  # the adapters
    built = group_norm(build_method(default_config(method), student, teacher))
    distiller = DetectionDistiller(student, teacher, built).train()
    step = DistributedDataParallel(distiller, broadcast_buffers=False) if ddp else distiller
    images, targets = batch(masks=True)
    for rank in ranks:
        torch.manual_seed(rank)
        out = step([images[rank]], [targets[rank]], torch.tensor([rank]), torch.tensor(0.5))
        (out.loss / len(ranks)).backward()
    return {name: p.grad for name, p in distiller.named_parameters()}


def evaluation(folder, rank=0, size=1):
    images = read_coco(Path(folder, "instances_train.json"), Path(folder, "images"))
    world = World(torch.device("cpu"), rank, size)
    model = two_stage(seed=2, box_score_thresh=0.0)
    fit(DetectionDistiller(model, None, "none"), images, 60)  # so that something is found
    return evaluate_detector(model, loader(images, 1, world=world).epoch(0), images, world)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = [gradients(kind, method, [rank], ddp=True) for kind, method in DISTRIBUTED]
    torch.save((results, evaluation(folder, rank, 2)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_and_metrics_of_one(tmp_path):
    write_set(tmp_path, 5)
    run_ranks(work, str(tmp_path))
    results, metrics = zip(*[torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)], strict=True)
    alone = evaluation(tmp_path)
    assert metrics == (alone, alone)
    assert alone["AP50"] > 0
    for i, (kind, method) in enumerate(DISTRIBUTED):
        expected = gradients(kind, method, [0, 1])
        assert any("adapters" in n or "regressors" in n or "fusions" in n for n in expected)
        for result in results:
            assert result[i].keys() == expected.keys()
            for name, want in expected.items():
                torch.testing.assert_close(
                    result[i][name], want, rtol=1e-4, atol=1e-6, msg=f"{method} {name}"
                )


def test_two_teachers_with_a_method_each(images):
    student, first, second = one_stage(0, width=4), one_stage(1), one_stage(2)
    one = next(batches(images, 1))
    losses = []
    for teacher, method in (([first, second], ["bckd", "fitnet"]), (first, "bckd"), (second, "fitnet")):
        weights = [0.5, 3.0] if isinstance(teacher, list) else None
        torch.manual_seed(0)
        distiller = DetectionDistiller(student, teacher, method, teacher_weights=weights).train()
        torch.manual_seed(0)
        losses.append(distiller(one.image, one.target).losses)
    both, bckd, fitnet = losses
    assert both.keys() == bckd.keys() | fitnet.keys()
    task = bckd.keys() & fitnet.keys()
    expected = {name: value * (1 if name in task else 0.5) for name, value in bckd.items()}
    expected |= {name: value * 3.0 for name, value in fitnet.items() if name not in task}
    torch.testing.assert_close(both, expected)
