"""The teacher live, and ahead of the student: the same run."""

from dataclasses import replace

import pytest
import torch
from small_runs import fit_alone, make_teacher, make_trainer, open_teacher

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data
from mdistiller.data.draws import Draws
from mdistiller.errors import Interrupted
from mdistiller.methods import DKDConfig, method_config
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.folder import RunFolder
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training import batches
from mdistiller.training.cached_teacher import CachedTeacher
from mdistiller.training.distributed import World
from mdistiller.training.signals import Stop

HERE = World(torch.device("cpu"))
DATA = DataConfig(kind="synthetic", synthetic_samples=40, synthetic_classes=4, image_size=8)


def config(**changes):
    settings = {
        "data": DATA,
        "augment": AugmentConfig(padding=1),
        "student": ModelConfig(name="resnet8"),
        "teacher": ModelConfig(name="resnet14"),
        "method": DKDConfig(warmup=0.0, beta=1.0),
        "optim": OptimConfig(lr=0.01, schedule="constant"),
        "batch_size": 8,
        "epochs": 2,
        "device": "cpu",
    }
    return ClassificationConfig(**(settings | changes))


def trainer(**changes):
    c = config(**changes)
    torch.manual_seed(7)
    student = mdistiller.create_model(c.student.name, 4)
    return make_trainer(c, load_data(c.data), student, make_teacher(), HERE)


def fit(t):
    fit_alone(t)
    return t.distiller.state_dict()


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=key, **tolerance)


# Crops and flips by number


@pytest.mark.parametrize(
    ("augment", "variants"),
    [(AugmentConfig(), 162), (AugmentConfig(flip=False, padding=2), 25), (AugmentConfig(padding=0), 2)],
)
def test_variants_are_numbered(augment, variants):
    images = torch.randint(256, (5000, 32, 32, 3), dtype=torch.uint8)
    module = Augment(augment, (0.0,) * 3, (1.0,) * 3, 4).train()
    assert module.variants(images) == variants
    drawn = module.draw(images, Draws(1, torch.arange(5000)))
    numbers = module.variant(images, drawn).tolist()
    assert set(numbers) == set(range(variants))
    crops = set(zip(numbers, drawn.top.tolist(), drawn.left.tolist(), drawn.flip.tolist(), strict=True))
    assert len(crops) == variants, "a number is one crop and flip"


@pytest.mark.parametrize(
    ("crop", "read_cropped", "made"),
    [("auto", True, ("padded", 0)), ("resized", True, ("padded", 0)), ("padded", False, ("padded", 4))],
)
def test_streamed_files_are_cropped_once(crop, read_cropped, made):
    splits = load_data(DATA.model_copy(update={"memory": "stream", "workers": 0}))
    train = replace(splits.train, random_crop=True)  # as one of image files says
    found = batches.ImageBatches(config(augment=AugmentConfig(crop=crop)), replace(splits, train=train), HERE)
    assert found.splits.train.random_crop == read_cropped
    assert (found.augment.config.crop, found.augment.config.padding) == made


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_an_image_of_an_epoch_is_the_same_in_any_batch(memory):
    """Whatever the batch size, the step, the rank and the other images are; another epoch has others."""
    data = DATA.model_copy(update={"memory": memory, "workers": 0})
    augment = AugmentConfig(policy="trivialaugment", seed=3)

    def images(epoch, world=HERE, **changes):
        made = config(data=data, augment=augment, **changes)
        found = batches.ImageBatches(made, load_data(data), world)
        found.augment.train()
        seen = {}
        for step in range(epoch * len(found.loader), (epoch + 1) * len(found.loader)):
            (batch,) = found.next_batches(step, 1)
            seen |= dict(zip(batch.index.tolist(), batch.image, strict=True))
        return seen

    first = images(1)
    for changes in ({"batch_size": 5}, {"seed": 9}, {"max_steps": 7}):
        other = images(1, **changes)
        assert other.keys() == first.keys()
        assert all(torch.equal(other[i], first[i]) for i in first), changes
    ranks = [images(1, World(HERE.device, rank, 2)) for rank in range(2)]
    assert all(torch.equal((ranks[0] | ranks[1])[i], first[i]) for i in first)
    assert sum(torch.equal(image, first[i]) for i, image in images(0).items()) < 8


# Ahead of the student


@pytest.mark.parametrize("method", ["dkd", "fitnet", "mlkd"])
@pytest.mark.parametrize("images", [16, 1000])
def test_running_ahead_changes_nothing_but_rounding(method, images):
    made = method_config(method)
    in_step, ahead = trainer(method=made), trainer(method=made, teacher_batch=images)
    assert (in_step.source.lookahead, ahead.source.lookahead) == (1, images // 8)
    calls = []
    ahead.distiller.asked.register_forward_pre_hook(lambda _, args: calls.append(len(args[0].image)))
    views = ahead.source.num_views
    assert_close(fit(in_step), fit(ahead), rtol=1e-3, atol=1e-5)
    assert calls == ([16 * views, 16 * views, 8 * views] if images == 16 else [40 * views]) * 2


def test_running_ahead_ends_with_max_steps_and_accumulates():
    optim = OptimConfig(lr=0.01, schedule="constant", accumulate=2)
    runs = [trainer(max_steps=3, optim=optim, teacher_batch=b, epochs=1) for b in (None, 16)]
    ends = [fit(t) for t in runs]
    assert [t.step for t in runs] == [3, 3]
    assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_a_signal_waits_for_the_group_and_the_run_goes_on_exactly(tmp_path):
    whole = trainer(teacher_batch=16)
    expected = fit(whole)

    class After(Stop):
        def requested(self, step, count):
            self.signal = "SIGTERM"
            return step + count >= 3

    stopped = trainer(teacher_batch=16)
    run = RunFolder.create(stopped.config.model_copy(update={"out": tmp_path / "run"}))
    with pytest.raises(Interrupted) as end:
        fit_alone(stopped, run, stop=After(HERE))
    run.close()
    assert "stopped by SIGTERM after step 4" in str(
        end.value
    )  # asked after the third step, the first of its group
    resumed = trainer(teacher_batch=16)
    resumed.load_state_dict(load_state(tmp_path / "run" / "resume.pt"))
    assert (resumed.step, resumed.batch) == (4, 4)
    found = fit(resumed)
    assert resumed.step == whole.step
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_student_that_teaches_itself_has_no_teacher_ahead():
    c = config(teacher=ModelConfig(name="self"), ema=0.9, teacher_batch=16, teacher_cache="unused")
    t = make_trainer(c, load_data(c.data), mdistiller.create_model("resnet8", 4), None, HERE)
    assert t.source.lookahead == 1
    assert open_teacher(t) == []
    assert not isinstance(t.distiller.asked, CachedTeacher)
