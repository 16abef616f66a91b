"""Trainers for tests, built from a config, data and models as `mdistiller.train` builds them."""

import contextlib
import io
import re
import shutil
import signal

import numpy as np
import torch
from PIL import Image

import mdistiller
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.progress import Reporter
from mdistiller.training.build import build_trainer
from mdistiller.training.distributed import World
from mdistiller.training.signals import Stop
from mdistiller.training.task import get_task
from mdistiller.training.trainer import fit

CPU = World(torch.device("cpu"))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SETTINGS = {
    "epochs": 1,
    "max_steps": 2,
    "batch_size": 8,
    "device": "cpu",
    "log_every": 1,
    "precision": "float32",
}


class StopAfter(Reporter):
    """Sends the process a signal, as a person or a scheduler does."""

    def __init__(self, step):
        self.at = step

    def step(self, done):
        if done == self.at:
            signal.raise_signal(signal.SIGTERM)


def make_trainer(config, data, student, teacher, world=CPU):
    """A trainer with its `source` of prepared batches, and the `task`."""
    task = get_task(config.task)
    source = task.make_batches(config, data, world)
    trainer = build_trainer(task, config, data, student, teacher, source, world)
    task.check_step(config, trainer.distiller, source, data)
    trainer.source, trainer.task = source, task
    return trainer


def prepare(trainer, raw, step=None):
    """The prepared batch of a raw one, and the teacher's outputs for it."""
    (batch,) = trainer.source.prepare([raw], trainer.step if step is None else step)
    return batch, *ask_teacher(trainer.distiller, [batch])


def next_batch(trainer, step):
    """The prepared batch of a step, and the teacher's outputs for it."""
    (batch,) = trainer.source.next_batches(step, 1)
    return batch, *ask_teacher(trainer.distiller, [batch])


def open_teacher(trainer):
    """Opens the teacher as a run does before its first batch; its lines for people."""
    teacher = trainer.distiller.asked
    return [] if teacher is None else teacher.open()


def step_on(trainer, raw):
    """One training step on a raw batch; the sums."""
    trainer.source.augment.train()
    return trainer.train_step(*prepare(trainer, raw))


def fit_alone(trainer, run=None, reporter=None, stop=None):
    """Trains to the end; the summary. An error that ends the run is raised."""
    trainer.run = run
    reporter = Reporter() if reporter is None else reporter
    for line in open_teacher(trainer):
        reporter.note(line)
    return fit(trainer, trainer.source, stop or Stop(trainer.world), reporter)


def make_teacher(side=8, seed=0):
    """A model of 4 classes whose batch norm has seen images, so that its logits differ among them."""
    torch.manual_seed(seed)
    model = mdistiller.create_model("resnet14", 4)
    with torch.no_grad():
        model(torch.randn(64, 3, side, side))
    return model.eval()


def stored_teacher(folder, side=8, seed=1):
    """The config of a stored `make_teacher`."""
    path = folder / "t.safetensors"
    save_student(path, make_teacher(side, seed), {})
    return ModelConfig(name="resnet14", checkpoint=path)


def folder_settings(root):
    """Settings of a short run on small images of a folder."""
    return {
        "data": DataConfig(kind="folder", root=root, image_size=16, workers=0),
        "augment": AugmentConfig(crop="padded", padding=1),
        "student": ModelConfig(name="resnet8"),
        "epochs": 2,
        "batch_size": 8,
        "log_every": 1,
        "device": "cpu",
        "layout": "contiguous",
    }


def ask_teacher(distiller, batches):
    """The teacher's outputs for some batches; None where the distiller asks for them in its call."""
    return distiller.ask_ahead(batches)


def photo(path, size):
    """Writes a picture of a size (width, height), stored on its side."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[0] // 4, size[1] // 4, 3), np.uint8)
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    Image.fromarray(pixels).resize(size[::-1]).save(path, exif=on_its_side)
    return path


def run_card(folder, tmp_path, size):
    """Runs the Python in an export's card on a `photo`: its variables, what it printed, and the photo."""
    folder = shutil.copytree(folder, tmp_path / "card")
    path = photo(folder / "image.jpg", size)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names, printed = {}, io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(code, names)
    return names, printed.getvalue(), path
