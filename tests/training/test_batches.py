"""The teacher live, ahead of the student, and from a table: the same run."""

import json
from dataclasses import replace

import processes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import fit_alone, make_trainer

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data
from mdistiller.errors import ConfigError, TrainingError
from mdistiller.methods import DKDConfig, KDConfig, get_method
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import load_state, save_student
from mdistiller.runs.folder import RunFolder
from mdistiller.runs.progress import Silent
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training import batches, teacher_table
from mdistiller.training.distributed import World
from mdistiller.training.launch import train
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


def teacher(seed=0):
    """Its batch norm has seen images, so that its logits differ among them."""
    torch.manual_seed(seed)
    model = mdistiller.create_model("resnet14", 4)
    with torch.no_grad():
        model(torch.randn(64, 3, 8, 8))
    return model.eval()


def trainer(**changes):
    c = config(**changes)
    torch.manual_seed(7)
    student = mdistiller.create_model(c.student.name, 4)
    return make_trainer(c, load_data(c.data), student, teacher(), HERE)


def fit(t):
    fit_alone(t)
    return t.learner.state_dict()


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
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    module = Augment(augment, (0.0,) * 3, (1.0,) * 3, 4).train()
    assert module.variants(images) == variants
    seen = set()
    for number in range(variants):
        draw = module.draw_of(images, number)
        assert module.variant(images, draw).tolist() == [number, number]
        seen.add((int(draw.top[0]), int(draw.left[0]), bool(draw.flip[0])))
    assert len(seen) == variants
    drawn = module.draw(images, torch.Generator().manual_seed(1))
    for i, number in enumerate(module.variant(images, drawn).tolist()):
        again = module.draw_of(images, number)
        assert [int(x[0]) for x in again[:3]] == [int(x[i]) for x in drawn[:3]]


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


# Ahead of the student


@pytest.mark.parametrize("method", ["dkd", "fitnet", "mlkd"])
@pytest.mark.parametrize("images", [16, 1000])
def test_running_ahead_changes_nothing_but_rounding(method, images):
    made = get_method(method).Config()
    in_step, ahead = trainer(method=made), trainer(method=made, teacher_batch=images)
    assert (in_step.source.lookahead, ahead.source.lookahead) == (1, images // 8)
    calls = []
    ahead.source.teacher.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    views = ahead.update.num_views
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
    with pytest.raises(TrainingError) as end:
        fit_alone(stopped, run, stop=After(HERE))
    run.close()
    assert "stopped by SIGTERM after step 4" in str(
        end.value
    )  # asked after the third step, the first of its group
    resumed = trainer(teacher_batch=16)
    resumed.load_state_dict(load_state(tmp_path / "run" / "resume.pt"))
    assert (resumed.step, resumed.batch) == (4, 4)
    assert resumed.source.generator.initial_seed() != stopped.source.generator.initial_seed()
    found = fit(resumed)
    assert resumed.step == whole.step
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_student_that_teaches_itself_has_no_teacher_ahead():
    c = config(teacher=ModelConfig(name="self"), ema=0.9, teacher_batch=16, teacher_table="unused")
    t = make_trainer(c, load_data(c.data), mdistiller.create_model("resnet8", 4), None, HERE)
    assert t.source.lookahead == 1
    t.source.open(Silent())
    assert t.source.table is None


# From a table


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_table_says_what_the_teacher_says(tmp_path, precision):
    live, looked_up = trainer(precision=precision), trainer(precision=precision, teacher_table=tmp_path)
    looked_up.source.open(Silent())
    assert looked_up.source.table.logits.shape == (40, 18, 4)
    for t in (live, looked_up):
        t.source.augment.train()
    raws = list(live.source.loader.epoch(0))
    for (batch, said), (same, read) in zip(
        live.source.prepare(raws, 3)[0], looked_up.source.prepare(raws, 3)[0], strict=True
    ):
        assert torch.equal(batch.image, same.image)
        assert read.features == {}
        # Half precision has 11 bits. The teacher's pass in batches of another size has a rounding of its own.
        own = 2**-7 if precision == "bfloat16" else 1e-5
        torch.testing.assert_close(read.logits, said.logits.float(), rtol=2**-11 + own, atol=own)


def test_a_run_with_the_table_is_the_run_with_the_teacher(tmp_path):
    live, looked_up = trainer(), trainer(teacher_table=tmp_path)
    looked_up.source.open(Silent())
    looked_up.source.teacher.forward = None  # the teacher does not run any more
    ends = fit(live), fit(looked_up)
    assert_close(*ends, rtol=1e-2, atol=1e-3)
    start = trainer().learner.state_dict()
    moved = max((ends[0][key] - start[key]).abs().max().item() for key in start)
    apart = max((ends[0][key] - ends[1][key]).abs().max().item() for key in start)
    assert apart < 1e-2 * moved


def opened(folder, **changes):
    """The table's only file, and how often the teacher was asked for it."""
    t = trainer(teacher_table=folder, **changes)
    asked = []
    t.source.teacher.register_forward_pre_hook(lambda _, args: asked.append(1))
    t.source.open(Silent())
    return t.source.table, len(asked)


def test_a_table_is_kept_for_other_students_methods_seeds_and_labels(tmp_path):
    first, asked = opened(tmp_path)
    assert asked == 18  # one pass of all 40 images for each variant
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    for changes in (
        {},
        {"seed": 5},
        {"method": KDConfig()},
        {"student": ModelConfig(name="resnet20")},
        {"batch_size": 4},
        {"data": DATA.model_copy(update={"label_noise": 0.5})},
    ):
        again, asked = opened(tmp_path, **changes)
        assert asked == 0
        assert torch.equal(again.logits, first.logits)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": AugmentConfig(padding=2)},
        {"augment": AugmentConfig(padding=1, flip=False)},
        {"precision": "bfloat16"},
        {"data": DATA.model_copy(update={"seed": 1})},
    ],
)
def test_other_data_augmentation_or_precision_have_another_table(tmp_path, changes):
    opened(tmp_path)
    assert opened(tmp_path, **changes)[1] > 0
    assert len(list(tmp_path.iterdir())) == 2


def test_another_teacher_has_another_table():
    images = load_data(DATA).train
    augment = Augment(AugmentConfig(), (0.0,) * 3, (1.0,) * 3, 4)
    model = teacher()
    keys = {teacher_table.table_key(model, images, augment, torch.float32)}
    assert teacher_table.table_key(teacher(), images, augment, torch.float32) in keys
    model.fc.bias.data[0] += 1e-3
    keys.add(teacher_table.table_key(model, images, augment, torch.float32))
    model.bn1.running_mean += 1e-3  # buffers count too
    keys.add(teacher_table.table_key(model, images, augment, torch.float32))
    assert len(keys) == 3


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def foreign(file):
    with safe_open(file, framework="pt") as content:
        about = json.loads(content.metadata()["mdistiller"])
        logits = content.get_tensor("logits").clone()
    save_file({"logits": logits}, file, {"mdistiller": json.dumps(about | {"key": "0" * 64})})


def not_ours(file):
    save_file({"logits": torch.zeros(2)}, file)


@pytest.mark.parametrize("spoil", [flip_a_bit, cut, foreign, not_ours, lambda file: file.write_bytes(b"")])
def test_a_damaged_or_foreign_file_is_built_again(tmp_path, spoil):
    first, _ = opened(tmp_path)
    kept = first.logits.clone()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    spoil(file)
    with pytest.warns(UserWarning, match="is built again"):
        again, asked = opened(tmp_path)
    assert asked == 18
    assert torch.equal(again.logits, kept)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("method", ["fitnet", "mlkd", "dkd+at"])
def test_methods_that_see_more_than_logits_keep_the_teacher(tmp_path, method):
    t = trainer(method=get_method(method).Config(), teacher_table=tmp_path / "none")
    t.source.open(Silent())
    assert t.source.table is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augment": AugmentConfig(mixup_alpha=0.2)}, "without mixup and CutMix"),
        ({"augment": AugmentConfig(cutmix_alpha=1.0)}, "without mixup and CutMix"),
        ({"augment": AugmentConfig(crop="resized")}, "crop 'resized' has too many variants"),
        ({"augment": AugmentConfig(policy="randaugment")}, "policy 'randaugment' has too many variants"),
        ({"data": DATA.model_copy(update={"memory": "stream", "workers": 0})}, "images in memory"),
    ],
)
def test_images_whose_variants_are_not_counted_are_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=f"teacher_table: .*{said}"):
        opened(tmp_path, **changes)


def test_logits_beyond_half_precision_are_refused(tmp_path):
    t = trainer(teacher_table=tmp_path)
    t.source.teacher.tapped.model.fc.bias.data[0] = 1e5
    with pytest.raises(ConfigError, match="beyond half precision"):
        t.source.open(Silent())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="teacher_table: cannot write"):
        opened(tmp_path / "file" / "tables")


def test_runs_from_the_command_line_share_a_table(tmp_path, monkeypatch):
    save_student(tmp_path / "t.safetensors", teacher(), {})
    c = config(
        teacher=ModelConfig(name="resnet14", checkpoint=tmp_path / "t.safetensors"),
        teacher_table=tmp_path / "tables",
    )
    first = train(c.model_copy(update={"out": tmp_path / "a"}))
    monkeypatch.setattr(batches, "build_logits", None)  # must not be called
    second = train(c.model_copy(update={"out": tmp_path / "b"}))
    assert {**first.summary, "seconds": 0, "ms_per_step": 0} == {
        **second.summary,
        "seconds": 0,
        "ms_per_step": 0,
    }
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored["teacher_table"] == str(tmp_path / "tables")


def test_of_several_processes_the_main_one_builds_it(tmp_path):
    save_student(tmp_path / "t.safetensors", teacher(), {})
    argv = ["train", "digits.dkd.resnet14_resnet8", "--data.kind", "synthetic"]
    argv += ["--data.synthetic-classes", "4", "--data.synthetic-samples", "40", "--data.image-size", "8"]
    argv += ["--teacher.checkpoint", "t.safetensors", "--teacher-table", "tables", "--batch-size", "8"]
    argv += ["--max-steps", "2", "--out", "run", "--json"]
    codes, (said, _), errors = processes.run_group(processes.mdistiller, *argv, cwd=tmp_path)
    assert codes == [0, 0], errors
    assert json.loads(said)["step"] == 2
    assert len(list((tmp_path / "tables").iterdir())) == 1
