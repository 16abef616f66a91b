"""Distillation by the `Trainer` of transformers."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mdistiller.distiller import Distiller
from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError
from mdistiller.models.tap_table import without_adapters
from mdistiller.types import Line

try:
    from transformers import PreTrainedModel, Trainer, TrainingArguments
    from transformers.modeling_outputs import SequenceClassifierOutput
except ImportError as error:
    raise MissingPackageError("mdistiller.integrations.hf", "transformers[torch]", "transformers") from error

_STUDENT = "distiller.student."  # before the student's keys in the state dict of the trainer's model


class DistillModel(torch.nn.Module):
    """Model of a `DistillTrainer`: the losses of a distiller in training, the student alone in evaluation."""

    accepts_loss_kwargs = False  # the loss is a mean, which the trainer divides when it accumulates

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller, self.losses = distiller, dict[str, torch.Tensor]()

    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> SequenceClassifierOutput:
        """Returns loss and logits of a batch; in evaluation without labels, the logits alone."""
        index, progress = inputs.pop("index", None), inputs.pop("progress", None)
        if not self.training:
            return SequenceClassifierOutput(*self.distiller.evaluate(inputs, labels))
        out = self.distiller(inputs, labels, index, progress)
        self.losses = {name: value.detach() for name, value in out.losses.items()}
        return SequenceClassifierOutput(out.loss, out.logits)

    def _checkpoint(self, name: str, **options: Any) -> None:
        """Turns gradient checkpointing on in the student, by its own function of this name."""
        student = self.distiller.student
        if not hasattr(student, name):
            raise ConfigError(
                f"gradient_checkpointing: the student {type(student).__name__} has none; allowed: False"
            )
        key = name.replace("enable", "kwargs")
        settings = {"use_reentrant": False} | (options.get(key) or {})
        if settings["use_reentrant"]:
            raise ConfigError(
                f"{key}: use_reentrant: got True, with which features get no gradient; allowed: False"
            )
        getattr(student, name)(**options | {key: settings})

    activation_checkpointing_enable = partialmethod(_checkpoint, "activation_checkpointing_enable")
    gradient_checkpointing_enable = partialmethod(_checkpoint, "gradient_checkpointing_enable")


class DistillTrainer(Trainer):
    """Trainer of transformers for a `Distiller`, whose student and method train.

    Evaluation and prediction run the student alone. Schedules follow the trainer's progress. A checkpoint has
    the student's own files, and the method's layers in `distiller.safetensors`; a resumed training continues
    with both. The log has the losses of the last batch by name. Each model gets the columns that it takes,
    methods with a memory of all images the column `index`. The arguments are those of `Trainer`, with a
    distiller in place of the model; a loss of the trainer's own, as with label smoothing, is a ConfigError.
    """

    model: DistillModel
    _signature_columns: Any

    def __init__(self, distiller: Distiller, args: TrainingArguments | None = None, **trainer: Any) -> None:
        if getattr(args, "label_smoothing_factor", 0) or trainer.get("compute_loss_func") is not None:
            raise ConfigError(
                "DistillTrainer: the loss is the distiller's; instead of label_smoothing_factor or "
                "compute_loss_func give Distiller(..., label_smoothing=…)"
            )
        super().__init__(DistillModel(distiller), args, **trainer)
        self.distiller, self.student = distiller, distiller.student

    def train(self, *args: Any, **options: Any) -> Any:
        if getattr(self.student, "_hf_peft_config_loaded", False):
            raise ConfigError(
                "DistillTrainer: the student got adapters from add_adapter or load_adapter, and checkpoints "
                "would lack its other weights; allowed: Distiller(peft.get_peft_model(student, config), …)"
            )
        return super().train(*args, **options)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Line,
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> torch.Tensor | tuple[torch.Tensor, SequenceClassifierOutput]:
        if model.training:
            done = self.state.global_step / max(self.state.max_steps, 1)
            inputs = {**inputs, "progress": torch.tensor(done, device=self.args.device)}
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {f"loss_{name}": float(value) for name, value in self.model.losses.items()}
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        models = map(without_adapters, (self.student, *self.distiller.teachers))
        taken = chain(*(inspect.signature(model.forward).parameters for model in models))
        self._signature_columns = ["label", "label_ids", "index", "pixel_values", *self.label_names, *taken]

    @contextmanager
    def _student_alone(self) -> Iterator[None]:
        """Makes the student the trainer's model while the trainer writes its own files."""
        model = self.model
        self.model = self.student  # type: ignore[assignment]
        try:
            yield
        finally:
            self.model = model

    def _save(self, output_dir: str | None = None, state_dict: Line | None = None) -> None:
        whole = self.model.state_dict() if state_dict is None else state_dict
        student = {k.removeprefix(_STUDENT): v for k, v in whole.items() if k.startswith(_STUDENT)}
        with self._student_alone():
            super()._save(output_dir, student)
        if self.args.should_save:
            rest = {k: v for k, v in whole.items() if not k.startswith(_STUDENT)}
            save_file(rest, Path(output_dir or str(self.args.output_dir)) / "distiller.safetensors")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        # Not the trainer's, which skips weights that transformers 5 saves under the names of version 4.
        folder, own = Path(resume_from_checkpoint), self.model.state_dict()
        student = self.student.state_dict()
        if without_adapters(self.student) is not self.student:
            with self._student_alone():
                super()._load_from_checkpoint(str(folder))
        elif isinstance(self.student, PreTrainedModel):
            student = type(self.student).from_pretrained(folder, config=self.student.config).state_dict()
        else:
            student = load_file(folder / "model.safetensors")
        path = folder / "distiller.safetensors"
        rest = load_file(path) if path.is_file() else {}
        if needed := {key for key in own if not key.startswith(_STUDENT)} ^ set(rest):
            raise CheckpointError(f"{path}: not of this method; missing, or of another: {sorted(needed)}")
        self.model.load_state_dict(rest | {_STUDENT + key: value for key, value in student.items()})

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
