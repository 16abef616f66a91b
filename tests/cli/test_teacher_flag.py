"""`mdistiller train … --teacher RUN`."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mdistiller
from mdistiller.cli.train import TrainCommand

KEYS = ("image_size", "mean", "std")


def metadata(run):
    with safe_open(run / "student.safetensors", "pt") as file:
        return json.loads(file.metadata()["mdistiller"])


def with_metadata(run, folder, **changes):
    """A copy of a run's student, with other metadata."""
    folder.mkdir()
    values = json.dumps(metadata(run) | changes)
    file = folder / "student.safetensors"
    save_file(load_file(run / file.name), file, {"mdistiller": values})
    return folder


@pytest.mark.parametrize("recipe", ["digits.dkd.resnet8", "digits.dkd.resnet20_resnet8"])
def test_a_run_gives_everything_about_its_teacher(cli, teacher_run, student_run, tmp_path, recipe):
    argv = ["--data.kind", "synthetic", "--data.synthetic-classes", "4", "--data.synthetic-samples", "64"]
    argv += ["--batch-size", "32", "--log-every", "1", "--device", "cpu", "--epochs", "2", "--seed", "3"]
    done = cli("train", recipe, "--teacher", teacher_run, *argv, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    found, expected = cli.config(tmp_path / "run"), cli.config(student_run)
    assert found["recipe"] == "digits.dkd.resnet8_resnet8"
    assert found["teacher"] == expected["teacher"]
    assert {k: found["data"][k] for k in KEYS} == {k: metadata(teacher_run)[k] for k in KEYS}
    one, other = (load_file(run / "student.safetensors") for run in (tmp_path / "run", student_run))
    assert all(value.equal(other[key]) for key, value in one.items())


def test_flags_come_before_the_run(teacher_run):
    mean = ["--data.mean", "0.1", "0.2", "0.3"]
    config = TrainCommand.parse(
        ["digits.kd.resnet8", "--teacher", str(teacher_run), "--data.image-size", "20", *mean]
    ).config
    assert (config.data.image_size, config.data.mean) == (20, (0.1, 0.2, 0.3))
    assert config.data.std == tuple(metadata(teacher_run)["std"])


def test_a_repeated_run_takes_another_teacher(cli, teacher_run, student_run, tmp_path):
    other = with_metadata(teacher_run, tmp_path / "other", mean=[0.5, 0.5, 0.5])
    config = TrainCommand.parse([str(student_run), "--teacher", str(other)]).config
    assert config.teacher.checkpoint == other
    assert config.data.mean == (0.5, 0.5, 0.5)
    assert config.recipe == "digits.dkd.resnet8_resnet8"
    done = cli("train", teacher_run, "--teacher", teacher_run)
    assert (done.code, "teacher: the run has none" in done.message) == (2, True)


def test_plugins_of_the_run_are_asked_for(cli, tmp_path, forget_plugins):
    plugin = tmp_path / "nets.py"
    plugin.write_text(
        "from mdistiller import create_model, register_model\n"
        "@register_model\n"
        "def net_of_a_plugin(num_classes, width=1):\n"
        "    return create_model('resnet8', num_classes)\n"
    )
    run = tmp_path / "teacher"
    argv = ("train", "digits.teacher.net_of_a_plugin", *cli.FAST, "--epochs", 1, "--out", run)
    assert cli(*argv, "--plugin", plugin, "--student.options", "width", 2).code == 0
    forget_plugins()
    words = ["digits.kd.resnet8", "--teacher", str(run)]
    assert f"give --plugin {plugin}" in cli("train", *words).message
    config = TrainCommand.parse([*words, "--plugin", str(plugin)]).config
    assert config.plugins == (plugin,)
    assert (config.teacher.name, config.teacher.options) == ("net_of_a_plugin", {"width": 2})
    assert config.recipe == "digits.kd.net_of_a_plugin_resnet8"


def test_a_model_by_name(cli):
    config = TrainCommand.parse(["imagenet.kd.resnet18", "--teacher", "resnet34"]).config
    assert config.teacher.options == {"weights": "IMAGENET1K_V1"}
    assert config.recipe == "imagenet.kd.torchvision/resnet34_torchvision/resnet18"
    done = cli("train", "digits.kd.resnet8", "--teacher", "resnet20")
    assert (done.code, "has no weights; give --teacher RUN, or" in done.message) == (2, True)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("digits.kd.resnet8", "--teacher", "runs/nope"), 2, "teacher: 'runs/nope' is no run folder"),
        (("digits.kd.resnet8", "--teacher", "docs/image"), 2, "or model; nearest: docs/images"),
        (
            ("digits.kd.resnet8", "--teacher", "resnet21"),
            2,
            "run folder, student's file or model; nearest: resnet32, resnet20",
        ),
        (("digits.teacher.resnet8", "--teacher", "resnet20"), 2, "use digits.METHOD.STUDENT"),
        (("digits.kd.resnet8", "--teacher"), 2, "--teacher: got no value"),
    ],
)
def test_wrong_teachers(cli, argv, code, words):
    done = cli("train", *argv)
    assert (done.code, words in done.message) == (code, True), done.err


def test_other_classes_are_an_error(cli, teacher_run, tmp_path):
    classes = ["ant", "bee", "cat", "dog"]
    run = with_metadata(teacher_run, tmp_path / "animals", classes=classes)
    argv = ("train", "digits.kd.resnet8", "--teacher", run, "--out", tmp_path / "out", "--device", "cpu")
    done = cli(*argv, "--data.kind", "synthetic", "--data.synthetic-classes", 10)
    assert (done.code, "has 4 classes, the data 10" in done.message) == (1, True), done.err
    from PIL import Image

    for split in ("train", "val"):
        for i, name in enumerate(["ant", "bee", "cow", "dog"]):
            (tmp_path / "root" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / "root" / split / name / "0.png")
    done = cli(*argv, "--data.kind", "folder", "--data.root", tmp_path / "root")
    assert done.code == 1
    assert "was trained on other classes than the data's: class 2 is 'cat' for the model" in done.message
    assert "'cow' in the data" in done.message


def test_help_has_the_flag(cli):
    assert "--teacher RUN|MODEL" in cli("train", "digits.kd.resnet20_resnet8", "--help").out


def test_a_model_with_its_librarys_weights(cli, teacher_run):
    argv = ["folder.kd.resnet8", "--teacher", "torchvision/resnet18", "--teacher.pretrained"]
    config = TrainCommand.parse(argv).config
    assert (config.teacher.name, config.teacher.options) == ("torchvision/resnet18", {"pretrained": True})
    assert config.recipe == "folder.kd.torchvision/resnet18_resnet8"
    assert TrainCommand.parse(argv[:-1]).config.teacher.options == {}
    argv = [
        "folder.kd.torchvision/resnet50_resnet8",
        "--teacher.pretrained",
        "--teacher.options",
        "width",
        "2",
    ]
    assert TrainCommand.parse(argv).config.teacher.options == {"width": 2, "pretrained": True}
    for more, have in (
        (("digits.kd.resnet8", "--teacher", teacher_run), "a teacher's checkpoint"),
        (("digits.student.resnet8",), "no teacher of its own"),
        (("digits.kd.self_resnet8",), "no teacher of its own"),
    ):
        done = cli("train", *more, "--teacher.pretrained")
        assert (done.code, f"teacher.pretrained: the run has {have}; allowed" in done.message) == (2, True)


def test_a_student_with_its_librarys_weights(capsys):
    argv = ["folder.kd.torchvision/resnet18", "--teacher", "torchvision/resnet50", "--student.options"]
    config = TrainCommand.parse([*argv, "width", "2", "--student.pretrained"]).config
    assert config.student.options == {"width": 2, "pretrained": True}
    assert config == TrainCommand.parse([*argv, "width", "2", "pretrained", "True"]).config
    assert config.optim.lr == mdistiller.get_recipe("folder.finetune.torchvision/resnet18").optim.lr
    assert "settings of folder.finetune.torchvision/resnet18" in capsys.readouterr().err


def test_another_teacher_than_the_recipes_is_named(capsys):
    TrainCommand.parse(["digits.kd.resnet20_resnet8", "--teacher", "resnet56"])
    assert capsys.readouterr().err == "teacher: resnet56 replaces the recipe's resnet20\n"
    TrainCommand.parse(["digits.kd.resnet20_resnet8", "--teacher", "resnet20"])
    TrainCommand.parse(["digits.kd.resnet8", "--teacher", "resnet56"])
    assert capsys.readouterr().err == ""
