"""What a run learns from: several teachers, its own average, an early epoch; and what it keeps of them."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from small_runs import make_trainer, step_on
from torch import nn

import mdistiller
from mdistiller.cli.eval import EvalCommand
from mdistiller.config import SELF
from mdistiller.data import Augment, DataConfig, load_data
from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.functional import kd_loss
from mdistiller.methods import (
    DKDConfig,
    ESKDConfig,
    KDConfig,
    MethodConfig,
    Needs,
    NoneConfig,
    load_plugin,
    method_config,
    register_method,
)
from mdistiller.models import ModelConfig, create_model
from mdistiller.recipes import get_recipe
from mdistiller.runs.checkpoint import load_state, save_student
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import ClassificationEvaluator
from mdistiller.tasks.classification.models import (
    Ensemble,
    build_model,
    check_statistics,
)
from mdistiller.teacher import LiveTeacher, Teachers
from mdistiller.training.distributed import World
from mdistiller.training.launch import train
from mdistiller.training.task import get_task
from mdistiller.types import Batch, Outputs

DATA = DataConfig(kind="synthetic", synthetic_samples=32, synthetic_classes=4, image_size=16)
CPU = World(torch.device("cpu"))

MORE = {"name": "resnet8", "checkpoint": "x"}


def config(**fields):
    base = {
        "data": DATA,
        "student": ModelConfig(name="resnet8"),
        "teacher": ModelConfig(name="resnet14"),
        "method": KDConfig(),
        "epochs": 2,
        "batch_size": 8,
        "device": "cpu",
        "log_every": 1,
    }
    return ClassificationConfig(**base | fields)


def models(*names):
    built = []
    for i, name in enumerate(names):
        torch.manual_seed(i)
        built.append(create_model(name, 4))
    return built


@pytest.fixture
def images():
    torch.manual_seed(9)
    return Batch(torch.randn(6, 3, 16, 16), torch.randint(0, 4, (6,)), torch.arange(6))


def test_several_teachers_agree_on_the_mean_of_their_logits(images):
    student, a, b = models("resnet8", "resnet14", "wrn_16_1")
    both = Ensemble([a, b])
    losses = mdistiller.Distiller(student, both, "kd").eval()(images.image, images.label).losses
    with torch.no_grad():
        mean = (a.eval()(images.image) + b.eval()(images.image)) / 2
        expected = 0.9 * kd_loss(student.eval()(images.image), mean)
    torch.testing.assert_close(losses["kd"], expected)


def test_or_their_losses_are_averaged_with_adapters_for_each(images, request, tmp_path):
    load_plugin(request.config.rootpath / "examples" / "my_feature_method.py")
    student, a, b = models("resnet8", "resnet14", "wrn_16_2")
    hint = method_config("my_hint", student_tap="stage2", teacher_tap="stage3.preact")
    torch.save(b.state_dict(), tmp_path / "b.pth")
    more = ({"name": "wrn_16_2", "checkpoint": tmp_path / "b.pth"},)
    first = ModelConfig(name="wrn_16_2", checkpoint=tmp_path / "b.pth")
    c = config(method=hint, teacher=first, more_teachers=more, ensemble="losses")
    method = make_trainer(c, load_data(DATA), student, [a, b]).distiller.method
    asked = [LiveTeacher(t, m.teacher_taps) for t, m in zip((a, b), method.parts, strict=True)]
    outputs = Teachers(asked)(images)
    ours = mdistiller.tap(student.eval(), method.student_taps)(images.image)
    got = method(ours, outputs, images, torch.tensor(1.0))
    expected = []
    for teacher, single in zip((a, b), method.parts, strict=True):
        tapped = mdistiller.tap(teacher.eval(), single.teacher_taps)
        expected.append(single(ours, tapped(images.image), images, torch.tensor(1.0)))
        tapped.untap()
    assert method.parts[0].adapter.out_features != method.parts[1].adapter.out_features
    torch.testing.assert_close(got["hint"], (expected[0]["hint"] + expected[1]["hint"]) / 2)


def test_teachers_come_from_their_checkpoints(tmp_path):
    a, b = models("resnet8", "resnet14")
    torch.save({"model": a.state_dict()}, tmp_path / "a.pth")
    torch.save({"model": b.state_dict()}, tmp_path / "b.pth")
    c = config(
        teacher=ModelConfig(name="resnet8", checkpoint=tmp_path / "a.pth"),
        more_teachers=(ModelConfig(name="resnet14", checkpoint=tmp_path / "b.pth"),),
        method=DKDConfig(),
        out=tmp_path / "run",
    )
    both = get_task("classification").build_teacher(c, load_data(c.data))
    assert [type(m) for m in both.members] == [type(a), type(b)]
    assert torch.equal(both.members[1].fc.weight, b.fc.weight)
    summary = train(c).summary
    assert summary["step"] == 8
    assert train(c.model_copy(update={"ensemble": "losses", "out": tmp_path / "run2"})).summary["step"] == 8


def test_a_student_starts_from_a_checkpoint_of_other_classes(tmp_path):
    torch.manual_seed(3)
    theirs = create_model("resnet8", 100)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    given = ModelConfig(name="resnet8", checkpoint=tmp_path / "w.pth")
    c = config(student=given, teacher=None, method=NoneConfig(), max_steps=1, out=tmp_path / "run")
    c = c.model_copy(update={"optim": c.optim.model_copy(update={"lr": 1e-12, "weight_decay": 0.0})})
    with pytest.warns(UserWarning, match="has 100 classes and is to be trained on 4"):
        run = train(c).path
    trained = load_file(run / "student.safetensors")
    assert trained["fc.weight"].shape == (4, 64)
    for key, value in theirs.named_parameters():
        if not key.startswith("fc."):
            torch.testing.assert_close(trained[key], value.detach(), msg=key)


@pytest.mark.parametrize(("recipe", "family"), [("digits.kd.resnet14_resnet8", "digits"), ("", "FAMILY")])
def test_a_teacher_of_other_classes_is_refused(tmp_path, recipe, family):
    torch.save(create_model("resnet14", 100).state_dict(), tmp_path / "w.pth")
    teacher = ModelConfig(name="resnet14", checkpoint=tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        train(config(recipe=recipe, teacher=teacher, out=tmp_path / "run"))
    assert str(caught.value) == (
        f"teacher.checkpoint: {tmp_path}/w.pth has 100 classes, the data 4: train it on this data first "
        f"(mdistiller train {family}.teacher.resnet14), then give --teacher.checkpoint FILE. "
        "Methods that read features alone, such as fitnet, take it as it is"
    )


GONE = "gone/model.pth"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": ModelConfig(name="resnet7")}, "unknown model 'resnet7'"),
        ({"student": ModelConfig(name="torchvision/resnet_18")}, "unknown torchvision model 'resnet_18'"),
        ({"student": ModelConfig(name="resnet8", checkpoint=GONE)}, "no such checkpoint: gone"),
        ({"teacher": ModelConfig(name="resnet14")}, "resnet14 has no weights"),
        ({"teacher": ModelConfig(name="resnet7", checkpoint=GONE)}, "unknown model 'resnet7'"),
        ({"teacher": ModelConfig(name="resnet14", checkpoint=GONE)}, "no such checkpoint: gone"),
        ({"more_teachers": ({"name": "resnet8", "checkpoint": GONE},)}, "no such checkpoint: gone"),
    ],
)
def test_models_are_checked_before_the_data_is_read(tmp_path, monkeypatch, fields, message):
    def read(config):
        raise AssertionError("the data was read")

    monkeypatch.setattr("mdistiller.tasks.classification.task.load_data", read)
    torch.save(create_model("resnet14", 4).state_dict(), tmp_path / "w.pth")
    teacher = ModelConfig(name="resnet14", checkpoint=tmp_path / "w.pth")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        train(config(**{"teacher": teacher, "out": tmp_path / "run"} | fields))
    assert not (tmp_path / "run").exists()


HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TOLD = r"was trained on images of other mean .*data.mean 0.5 0.5 0.5 and data.std 0.5 0.5 0.5$"


def test_other_mean_and_deviation_than_those_of_pretraining_are_told():
    given = ModelConfig(name="timm/vit_tiny_patch16_224", options={"pretrained": True})
    data = load_data(DATA)
    c = config(student=given)
    with pytest.warns(UserWarning, match=f"^timm/vit_tiny_patch16_224 {TOLD}"):
        check_statistics(c, data)
    check_statistics(c, load_data(DATA.model_copy(update=HALF)))
    check_statistics(config(student=given.model_copy(update={"options": {}})), data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"more_teachers": ({"name": "resnet8"},)}, "each needs a checkpoint"),
        ({"more_teachers": (MORE,), "teacher": None}, "the first one goes into teacher"),
        ({"teacher": ModelConfig(name=SELF)}, "needs the average's decay"),
        ({"more_teachers": (MORE,), "teacher": ModelConfig(name=SELF), "ema": 0.9}, "the first one goes"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def own_average(**fields):
    c = config(teacher=ModelConfig(name=SELF), ema=0.9, **fields)
    torch.manual_seed(0)
    return make_trainer(c, load_data(c.data), create_model("resnet8", 4), None, CPU)


def test_a_student_learns_from_its_own_average():
    trainer = own_average()
    assert trainer.distiller.asked.model is trainer.ema.module
    trainer.distiller.train()
    trainer.source.augment.train()
    batches = trainer.source.loader.epoch(0)
    start = trainer.student.fc.weight.detach().clone()
    first = step_on(trainer, next(batches))
    assert abs(first["kd"].item()) < first["task"].item()  # not zero: batch norm trains in one, not the other
    moved = trainer.student.fc.weight.detach()
    average = trainer.ema.module.fc.weight
    torch.testing.assert_close(average, 0.9 * start + 0.1 * moved, rtol=1e-5, atol=1e-7)
    assert not any(p.requires_grad for p in trainer.ema.module.parameters())
    step_on(trainer, next(batches))
    assert not trainer.ema.module.training
    assert not any(m.training for m in trainer.distiller.asked.model.modules())
    # Only the student and the method train.
    assert len(trainer.update.optimizer.param_groups[0]["params"]) == len(list(trainer.student.parameters()))


def test_the_average_that_teaches_is_in_the_state_and_in_the_folder(tmp_path):
    run = train(config(teacher=ModelConfig(name=SELF), ema=0.9, out=tmp_path / "run")).path
    trainer = own_average()
    trainer.load_state_dict(load_state(run / "resume.pt"))
    stored = load_file(run / "ema_student.safetensors")
    taught = trainer.distiller.asked.model.state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in taught.items())
    assert any(not torch.equal(v, stored[k]) for k, v in load_file(run / "student.safetensors").items())


def test_recipes_of_self_distillation():
    c = get_recipe("cifar100.dkd.self_resnet8x4")
    assert (c.teacher.name, c.student.name, c.ema, c.method.method_name) == (
        "self",
        "resnet8x4",
        0.999,
        "dkd",
    )
    assert get_recipe("cifar100.dkd.resnet32x4_resnet8x4").ema is None
    with pytest.raises(UnknownNameError):
        get_recipe("cifar100.dkd.resnet8x4_self")


def test_chosen_epochs_are_kept_and_teach(tmp_path):
    constant = {"schedule": "constant"}
    c = config(teacher=None, method=NoneConfig(), epochs=3, save_epochs=(1, 2), optim=constant)
    run = train(c.model_copy(update={"out": tmp_path / "teacher"})).path
    kept = sorted(p.name for p in run.glob("student-e*"))
    assert kept == ["student-e1.safetensors", "student-e2.safetensors"]
    early = load_file(run / "student-e1.safetensors")
    one = train(c.model_copy(update={"out": tmp_path / "one", "epochs": 1})).path
    after_one = load_file(one / "student.safetensors")
    assert all(torch.equal(value, after_one[key]) for key, value in early.items())
    assert any(not torch.equal(v, load_file(run / "student.safetensors")[k]) for k, v in early.items())
    teacher = ModelConfig(name="resnet8", checkpoint=run / "student-e1.safetensors")
    model = build_model(teacher, 4)
    assert all(torch.equal(v, early[k]) for k, v in model.state_dict().items())
    done = train(config(teacher=teacher, method=ESKDConfig(stop=0.5), out=tmp_path / "student"))
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    kd = [line["kd"] for line in lines if line["kind"] == "train"]
    assert all(value > 0 for value in kd[:4])
    assert kd[4:] == [0.0] * 4


@pytest.mark.parametrize(("top1s", "best"), [((50.0, 70.0, 60.0), 2), ((50.0, 50.0, 50.0), 1)])
def test_the_best_epoch_s_student_is_kept(tmp_path, monkeypatch, top1s, best):
    said = iter(top1s)
    evaluate = ClassificationEvaluator.__call__
    monkeypatch.setattr(
        ClassificationEvaluator, "__call__", lambda *args: evaluate(*args) | {"top1": next(said)}
    )
    c = config(teacher=None, method=NoneConfig(), epochs=3, save_epochs=(1, 2, 3), out=tmp_path / "run")
    run = train(c.model_copy(update={"save_best": True})).path
    found, expected = (load_file(run / f"student-{name}.safetensors") for name in ("best", f"e{best}"))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("method", ["none", "simkd"])  # simkd's student ends in a part of the teacher
def test_a_run_s_student_comes_back(tmp_path, method):
    save_student(tmp_path / "t.safetensors", mdistiller.create_model("resnet14", 4), {})
    taught = ModelConfig(name="resnet14", checkpoint=tmp_path / "t.safetensors") if method != "none" else None
    c = config(teacher=taught, method=method_config(method), epochs=1, out=tmp_path / "run")
    done = train(c)
    splits = load_data(c.data)
    found = mdistiller.load_student(done.path)
    assert not found.training
    assert found.state_dict().keys() == load_file(done.path / "student.safetensors").keys()
    image = Augment(c.augment, splits.mean, splits.std, 4).normalize(splits.test.images)
    with torch.no_grad():
        right = found(image).argmax(1) == splits.test.labels
    assert 100 * right.float().mean().item() == pytest.approx(done.summary["last"]["top1"])
    same = mdistiller.load_student(done.path / "student.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), same.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="is no student of a run"):
        mdistiller.load_student(tmp_path / "t.safetensors")


class TwoViewsConfig(MethodConfig):
    pass


class TwoViews(mdistiller.Method):
    """Looks at what a method with two views gets."""

    Config = TwoViewsConfig
    needs = Needs(views=2)
    seen = None

    def forward(self, student, teacher, batch, progress):
        type(self).seen = batch
        return {"x": 0 * teacher.logits.mean()}


def test_a_method_may_ask_for_a_weak_and_a_strong_view(registries):
    method = register_method("two_views")(TwoViews).Config()
    augment = {"padding": 0, "flip": False, "strong_policy": "randaugment"}
    for parts, per_view in ((1, 8), (2, 4)):
        c = config(method=method, augment=augment, optim={"accumulate": parts})
        trainer = make_trainer(c, load_data(DATA), *models("resnet8", "resnet14"), CPU)
        trainer.distiller.train()
        trainer.source.augment.train()
        raw = next(iter(trainer.source.loader.epoch(0)))
        sums = step_on(trainer, raw)
        assert sums["n"].item() == 16
        seen = TwoViews.seen
        assert seen.image.shape == (2 * per_view, 3, 16, 16)
        assert torch.equal(seen.label[:per_view], seen.label[per_view:])
        assert torch.equal(seen.index[:per_view], raw.index[-per_view:])
        weak = trainer.source.augment.eval()(raw).image[-per_view:]
        assert torch.equal(seen.image[:per_view], weak)
        assert not torch.equal(seen.image[per_view:], weak)
    mixed = config(method=method, augment={"mixup_alpha": 0.2})
    with pytest.raises(ConfigError, match="compares views"):
        make_trainer(mixed, load_data(DATA), *models("resnet8", "resnet14"), CPU)


def test_ensemble_outputs_with_a_model_that_wraps_its_logits(images):
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return Outputs(self.model(x), {})

    a, b = models("resnet8", "resnet14")
    got = Ensemble([Wrapped(a), b]).eval()(images.image)
    torch.testing.assert_close(got, (a(images.image) + b(images.image)) / 2)


def test_what_a_method_makes_of_the_student_is_saved_and_built_again(tmp_path, capsys):
    """SimKD predicts with the teacher's classifier: the saved student has it, and needs no teacher."""
    _, teacher = models("resnet8", "wrn_16_2")
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    given = ModelConfig(name="wrn_16_2", checkpoint=tmp_path / "teacher.pth")
    c = config(teacher=given, method=method_config("simkd"), ema=0.5, out=tmp_path / "run")
    result = train(c)
    (tmp_path / "teacher.pth").unlink()
    for file in ("student.safetensors", "ema_student.safetensors"):
        built = build_model(ModelConfig(name="resnet8", checkpoint=result.path / file), 4)
        torch.testing.assert_close(built.classifier.weight, teacher.fc.weight, rtol=0, atol=0)
        assert built(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    args = [
        "resnet8",
        "--checkpoint",
        str(result.path),
        "--data.kind",
        "synthetic",
        "--data.image-size",
        "16",
    ]
    args += ["--data.image-size", "16", "--data.synthetic-samples", "32"]
    args += ["--data.synthetic-classes", "4", "--json"]
    EvalCommand.parse(args).execute()
    figures = json.loads(capsys.readouterr().out)
    assert figures["top1"] == pytest.approx(result.summary["last"]["top1"])
    assert figures["loss"] == pytest.approx(result.summary["last"]["loss"], rel=1e-5)


# Mean, standard deviation and size of pretrained weights


def resolved(student, **data):
    c = get_recipe("folder.finetune.resnet8").replace(student=student, data=data)
    return get_task("classification").resolve(c).data


def test_weights_bring_mean_deviation_and_size_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    name = "tf_efficientnet_lite0"
    known = timm.models.get_pretrained_cfg(name)
    save_student(tmp_path / "w.safetensors", torch.nn.Linear(1, 1), {})
    for given in ({"checkpoint": tmp_path / "w.safetensors"}, {"options": {"pretrained": True}}):
        data = resolved({"name": f"timm/{name}", **given})
        assert (data.mean, data.std, data.image_size) == (known.mean, known.std, known.input_size[1])
        kept = resolved({"name": f"timm/{name}", **given}, mean=(0.1, 0.2, 0.3), image_size=96)
        assert (kept.mean, kept.std, kept.image_size) == ((0.1, 0.2, 0.3), known.std, 96)
    sized = {"name": "timm/vit_tiny_patch16_224", "options": {"pretrained": True, "img_size": 96}}
    assert resolved(sized).image_size == 96


def test_weights_bring_mean_deviation_and_size_of_torchvision():
    from torchvision.models import EfficientNet_B4_Weights

    preset = EfficientNet_B4_Weights.DEFAULT.transforms()
    name = "torchvision/efficientnet_b4"
    for options in ({"weights": "DEFAULT"}, {"weights": "IMAGENET1K_V1"}, {"pretrained": True}):
        data = resolved({"name": name, "options": options})
        assert (list(data.mean), list(data.std)) == (preset.mean, preset.std)
        assert data.image_size == preset.crop_size[0] == 380


def test_weights_of_a_run_bring_those_of_the_run(tmp_path):
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": 64}
    save_student(tmp_path / "student.safetensors", torch.nn.Linear(1, 1), facts)
    data = resolved({"name": "resnet8", "checkpoint": tmp_path})
    assert (data.mean, data.std, data.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)


def test_random_weights_and_unknown_ones_bring_nothing(tmp_path):
    torch.save({}, tmp_path / "w.pt")
    for student in ({"name": "torchvision/resnet18"}, {"name": "resnet8", "checkpoint": tmp_path / "w.pt"}):
        data = resolved(student)
        assert data.mean is data.std is data.image_size is None
    with_size = resolved({"name": "torchvision/resnet18", "options": {"pretrained": True}}, kind="cifar10")
    assert with_size.image_size is None  # CIFAR has a size of its own
    assert with_size.mean == (0.485, 0.456, 0.406)


def test_a_run_writes_the_values_that_it_used(tmp_path):
    first = config(teacher=None, method=NoneConfig(), max_steps=1, data=DATA.model_copy(update=HALF))
    path = train(first.replace(out=tmp_path / "first")).path
    second = config(teacher=None, method=NoneConfig(), max_steps=1).replace(
        student={"name": "resnet8", "checkpoint": path}, out=tmp_path / "second"
    )
    assert second.data.mean is None
    again = train(second).path
    stored = json.loads((again / "config.json").read_text())["data"]
    assert (stored["mean"], stored["std"]) == (list(HALF["mean"]), list(HALF["std"]))
    assert train(second, resume=True).summary["step"] == 1
