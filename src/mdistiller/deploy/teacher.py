"""A teacher from its run, with everything that the run knows about it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from mdistiller.config import RunConfig
from mdistiller.deploy.student import open_student, plugins_named, run_config
from mdistiller.methods import get_method
from mdistiller.models import ModelConfig
from mdistiller.types import Line


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher that a path or a name gives.

    model: its config; a string is the name of a model, whose family may have weights for it.
    data: size, mean and standard deviation of the images that a run's teacher was trained on.
    """

    model: ModelConfig | str
    data: Line = field(default_factory=dict)

    def fit_data(self, config: RunConfig) -> RunConfig:
        """Returns a config whose images are prepared as the teacher's were."""
        if config.data_settings is None:
            return config
        fields = type(config.data_settings).model_fields
        return config.replace(data={name: value for name, value in self.data.items() if name in fields})


def find_teacher(word: str | Path) -> GivenTeacher:
    """Finds the teacher in a run folder or in a student's file; any other word is a model's name.

    Raises:
        CheckpointError: no student there, or a file without metadata.
        ConfigError: its model is of a plug-in that is not loaded.
    """
    source = Path(word)
    if not os.path.exists(source):
        return GivenTeacher(str(word))
    file = open_student(source)
    folder, metadata = file.path.parent, file.metadata
    extension = metadata.get("extension")
    with plugins_named(folder):
        file.task.check_model(metadata["model"])
        if extension is not None:
            file.task.check_model(extension["teacher"])
            get_method(extension["method"]["name"])
    data: Line = {name: metadata[name] for name in ("image_size", "mean", "std") if name in metadata}
    settings = run_config(folder).get("data")
    if data and isinstance(settings, dict):
        data["resize"] = settings.get("resize")  # goes with image_size
    model = ModelConfig(name=metadata["model"], options=metadata["options"], checkpoint=source)
    return GivenTeacher(model, data)
