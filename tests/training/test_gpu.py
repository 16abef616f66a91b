"""The same trainer on a GPU: equal metrics, all precisions, and no waiting for the device in a step."""

import pytest
import torch
from small_runs import ask_teacher, make_trainer, open_teacher, step_on

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.data.draws import Draws
from mdistiller.data.loader import PlainBatches
from mdistiller.data.policy import Policy
from mdistiller.methods import DKDConfig, KDConfig, NoneConfig
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.training.distributed import World
from mdistiller.training.launch import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DATA = DataConfig(kind="synthetic", synthetic_samples=512, synthetic_classes=10)
METHODS = [NoneConfig(), KDConfig(), DKDConfig(warmup=0.0, beta=1.0)]


@pytest.fixture(autouse=True)
def choose_kernels(monkeypatch):
    """Whatever a run before has set."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def trainer(device="cuda", **changes):
    settings = {
        "data": DATA,
        "augment": AugmentConfig(),
        "student": ModelConfig(name="resnet8"),
        "method": DKDConfig(warmup=0.0, beta=1.0),
        "optim": OptimConfig(lr=0.02, schedule="constant"),
        "epochs": 10,
        "device": device,
    }
    config = ClassificationConfig(**(settings | changes))
    torch.manual_seed(0)
    student, teacher = (mdistiller.create_model(name, 10) for name in ("resnet8", "resnet14"))
    return make_trainer(config, load_data(config.data), student, teacher, World(torch.device(device)))


def losses(t, n):
    t.distiller.train()
    sums = []
    for epoch in range(100):
        for raw in t.source.loader.epoch(epoch):
            sums.append(step_on(t, raw))
            if len(sums) == n:
                return [float(s["loss"] / s["n"]) for s in sums]
    raise AssertionError


def test_the_first_losses_equal_the_cpu_s():
    still = AugmentConfig(flip=False, padding=0)
    assert losses(trainer(augment=still), 3) == pytest.approx(
        losses(trainer("cpu", augment=still), 3), rel=1e-2
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
def test_the_loss_falls(method, precision, mode):
    found = losses(trainer(method=method, precision=precision, compile=mode), 40)
    assert sum(found[-4:]) < 0.8 * sum(found[:4])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment", "fixmatch"])
def test_a_step_never_waits_for_the_device(precision, policy):
    augment = AugmentConfig(policy=policy, mixup_alpha=0.2, cutmix_alpha=1.0)
    optim = OptimConfig(clip_norm=5.0, accumulate=2)
    t = trainer(precision=precision, augment=augment, optim=optim, ema=0.9)
    losses(t, 2)
    raws = list(t.source.loader.epoch(1))[:3]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for raw in raws:
            step_on(t, raw)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["autoaugment", "randaugment", "trivialaugment", "fixmatch"])
def test_policies_change_images_as_on_the_cpu(name):
    images = load_data(DATA).train.images
    ours, reference = (Policy(name, 32, 32, torch.device(device)) for device in ("cuda", "cpu"))
    drawn = reference.draw(Draws(0, torch.arange(len(images))))
    found = ours.apply(images.cuda(), drawn.cuda()).cpu().int()
    # But for the rounding of places halfway between two pixels, and of levels close to the next one.
    assert (found != reference.apply(images, drawn).int()).float().mean() < 0.02


def test_the_teacher_runs_ahead_and_the_cache_says_the_same(tmp_path):
    live = trainer(data=DATA.model_copy(update={"synthetic_samples": 64}))
    assert live.source.lookahead == 16  # 1,024 of these images
    looked_up = trainer(data=live.config.data, teacher_cache=tmp_path, teacher_cache_format="fp16")
    open_teacher(looked_up)
    raws = list(live.source.loader.epoch(0))
    given, found = (t.source.prepare(raws, 0) for t in (live, looked_up))
    ask_teacher(looked_up.distiller, found[::2])  # the others are computed, and these are read
    asked = (ask_teacher(live.distiller, given), ask_teacher(looked_up.distiller, found))
    for batch, same, said, read in zip(given, found, *asked, strict=True):
        assert torch.equal(batch.image, same.image)
        torch.testing.assert_close(read.logits, said.logits.float(), rtol=1e-2, atol=1e-2)


def test_evaluation_equals_the_cpu_s():
    splits = load_data(DATA)
    torch.manual_seed(0)
    model = mdistiller.create_model("resnet8x4", 10)
    metrics = []
    for device in ("cpu", "cuda"):
        here = World(torch.device(device))
        batches = PlainBatches(splits.test, splits, 100, device=device)
        metrics.append(evaluate(model.to(device), batches, here))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)


def test_a_whole_run(tmp_path):
    config = ClassificationConfig(
        data=DATA, student=ModelConfig(name="resnet8x4"), epochs=2, out=tmp_path / "run", precision="bfloat16"
    )
    summary = train(config).summary
    assert summary["step"] == 16
