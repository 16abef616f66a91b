"""Teachers: frozen models that are asked for the outputs of a batch."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from mdistiller.models.own_input import own_inputs
from mdistiller.taps import Taps
from mdistiller.types import AnyBatch, Batch, Inputs, LogitsOf, Outputs, joined


class EvalMode:
    """Context in which modules are in evaluation mode; each gets its own mode back afterwards."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.training = [module for module in modules if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module in self.training:
            module.training = True


def hash_weights(model: nn.Module) -> str:
    """Computes the SHA-256 of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Teacher(nn.Module):
    """A model that is asked: a call computes its `Outputs` for a batch, without gradients.

    The model is not changed: its mode is put back after each pass, and its parameters keep `requires_grad`.

    Args:
        model: the model, or several in one module.
    """

    needs_student = False
    """Whether the outputs depend on the student's pass, which a call then gets as context."""
    needs_index = False
    """Whether the outputs depend on the samples' positions in the training set."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self.notes: list[str] = []
        """Further lines for `open`."""

    def train(self, mode: bool = True) -> Self:
        return self  # the model keeps its own mode

    def forward(self, batch: AnyBatch, context: object = None) -> Outputs:
        """Computes the outputs for a batch, detached.

        Args:
            batch: the batch, as the student gets it.
            context: the student's pass, for a teacher that needs it.
        """
        raise NotImplementedError

    def ask(self, batches: Sequence[AnyBatch]) -> list[Outputs]:
        """Computes the outputs for each of some batches, in as few passes as possible."""
        return [self(batch) for batch in batches]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's weights and buffers, which stay as they are."""
        return hash_weights(self.model)

    @property
    def live(self) -> "Teacher":
        """The teacher without its cache."""
        return self

    @property
    def members(self) -> "tuple[Teacher, ...]":
        """The teachers of which it is made; itself alone, unless there are several."""
        return (self,)

    def open(self) -> list[str]:
        """Prepares for the first batch of a run; returns lines about the teacher for people."""
        own = own_inputs(self.model)
        lines = [f"teacher {type(m.model).__name__}: images of its own, {m.describe()}" for m in own]
        return lines + self.notes


class LiveTeacher(Teacher):
    """A teacher that runs on every batch.

    Args:
        model: any module whose result holds logits [B, classes], see `logits_of`; for a method of features
            alone, any module.
        taps: names of the features to return with the logits.
        logits_of: the logits in the model's result, see `mdistiller.taps.logits_of`.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[str] = (),
        logits_of: LogitsOf = None,
    ) -> None:
        super().__init__(model)
        self.taps = Taps(model, taps, logits_of)
        self._parts = list(model.modules())  # walking the tree takes longer than some passes
        self.autocast: AbstractContextManager[object] = nullcontext()
        """Context of the passes, by default that of the caller."""

    def forward(self, batch: AnyBatch, context: object = None) -> Outputs:
        mode = EvalMode(self._parts)
        # Not `inference_mode`: the outputs enter autograd.
        with torch.no_grad(), self.autocast:
            inputs = self._as_weights(batch.image)
            if not mode.training:
                return self.taps(inputs)
            with mode:
                return self.taps(inputs)

    def _as_weights(self, inputs: Inputs) -> Inputs:
        """Returns float32 inputs in the precision of a teacher in half precision."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        if dtype not in (torch.float16, torch.bfloat16):
            return inputs
        if isinstance(inputs, Mapping):
            return {name: self._as_weights(value) for name, value in inputs.items()}
        is_wider = isinstance(inputs, Tensor) and inputs.dtype == torch.float32
        return inputs.to(dtype) if is_wider else inputs

    def ask(self, batches: Sequence[AnyBatch]) -> list[Outputs]:
        if len(batches) == 1:
            return [self(batches[0])]
        logits, features = self(
            Batch(joined([batch.image for batch in batches]), batches[0].index, batches[0].index)
        )
        sizes = [len(batch.index) for batch in batches]
        parts = {name: value.split(sizes) for name, value in features.items()}
        own = logits.split(sizes) if logits.ndim > 1 else [logits] * len(sizes)
        return [
            Outputs(part, {name: values[i] for name, values in parts.items()}) for i, part in enumerate(own)
        ]


class Teachers(Teacher):
    """Several teachers of any kinds, each with its own images, taps and cache.

    In the joined outputs, feature NAME of teacher i (from 0) is called `i/NAME`, and its logits, if it has
    some, `i/`.

    Args:
        members: the teachers.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        super().__init__(nn.ModuleList(member.model for member in members))
        self._members = tuple(members)
        self.needs_student = any(member.needs_student for member in members)
        self.needs_index = any(member.needs_index for member in members)

    @property
    def members(self) -> tuple[Teacher, ...]:
        return self._members

    @property
    def live(self) -> "Teachers":
        return Teachers([member.live for member in self._members])

    @cached_property
    def fingerprint(self) -> str:
        """Hashes of the members' weights, joined by `+`."""
        return "+".join(member.fingerprint for member in self._members)

    def forward(self, batch: AnyBatch, context: object = None) -> Outputs:
        return _join([member(batch, context) for member in self._members])

    def ask(self, batches: Sequence[AnyBatch]) -> list[Outputs]:
        return [
            _join(found) for found in zip(*(member.ask(batches) for member in self._members), strict=True)
        ]

    def open(self) -> list[str]:
        return [line for member in self._members for line in member.open()]


def _join(outputs: Iterable[Outputs]) -> Outputs:
    features: dict[str, Tensor] = {}
    for i, (logits, found) in enumerate(outputs):
        features |= {f"{i}/{name}": value for name, value in found.items()}
        if logits.ndim > 1:
            features[f"{i}/"] = logits
    return Outputs(torch.empty(0), features)
