"""Diagnostics of a run on fixed images: the parts of KD, confidence, agreement, calibration."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mdistiller.data import ImageSet, Splits
from mdistiller.data.encoded import EncodedSet, decode
from mdistiller.data.loader import PlainBatches
from mdistiller.methods.dkd import dkd_samples, logit_gap
from mdistiller.training.distributed import World
from mdistiller.training.precision import sum_dtype
from mdistiller.types import IGNORED, Batch, Line

TEMPERATURE = 4.0
"""Temperature of the reported TCKD and NCKD, the same for all methods, so that runs compare."""
TRAIN_IMAGES = 1000
Watch = Callable[[int, Tensor, Tensor], None]
"""Takes each batch's number, float32 logits and labels."""
_BINS = 15  # as Guo et al., On Calibration of Modern Neural Networks, ICML 2017


class Diagnostics:
    """Comparison of a student with its teacher on the test images, and on some unaugmented training images.

    The teacher runs once on each image; its logits are kept.

    Args:
        teacher: the teacher; None where there is none or it changes.
        splits: the data. Training images are used unless they are a registered stream.
        plain: returns the batches of a set of images, as `PlainBatches`.
        evaluate: runs a model on batches, and calls its argument `watch` for each of them.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        splits: Splits,
        plain: Callable[..., PlainBatches],
        evaluate: Callable[..., Line],
        world: World,
    ) -> None:
        self.teacher, self.evaluate, self.world = teacher, evaluate, world
        self.known: dict[str, list[Tensor]] = {}
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.train: PlainBatches | None = None
        if isinstance(splits.train, ImageSet | EncodedSet) and (splits.train.labels != IGNORED).any():
            known = (splits.train.labels != IGNORED).nonzero()[:, 0]
            count = min(TRAIN_IMAGES, len(known))
            # Evenly over the set: some have their images sorted by class.
            images = splits.train.select(known[torch.linspace(0, len(known) - 1, count).long()])
            if isinstance(images, EncodedSet):
                images = decode(replace(images, random_crop=False), workers=2)
            self.train = plain(images)

    def watch(self, name: str, batches: Iterable[Batch]) -> Watch:
        """Returns a function for `evaluate` that adds up the student's diagnostics on the images of a name.

        `batches` are those that `evaluate` gets, for the teacher.
        """
        if self.teacher is not None and name not in self.known:
            known = self.known[name] = []
            found = self.evaluate(self.teacher, batches, watch=lambda i, logits, label: known.append(logits))
            if name == "test":
                self._check_teacher(found["top1"], known)
        sums = self.sums[name] = {}

        def add(i: int, logits: Tensor, label: Tensor) -> None:
            teacher_logits = self.known[name][i] if name in self.known else None
            for key, value in _sums(logits, teacher_logits, label).items():
                sums[key] = sums.get(key, 0) + value

        return add

    def _check_teacher(self, top1: float, known: list[Tensor]) -> None:
        """Warns about a teacher that guesses."""
        chance = 100 / known[0].shape[1] if known else 0.0
        if top1 <= chance and self.world.is_main:
            warnings.warn(
                f"teacher: its top-1 on the test images is {top1:.2f} %, no better than chance "
                f"({chance:.2f} %); check its weights, the order of its classes, and mean and std of its "
                "images",
                stacklevel=2,
            )

    def metrics(self, student: nn.Module) -> dict[str, dict[str, float]]:
        """Computes the means by name of the images: those since the last call, and the training images.

        Both models: agreement, % of images with the same first class; tckd and nckd at temperature 4, times
        16, in nats. The student, and the teacher with the prefix `teacher_`: p_t, the target's probability;
        gap, its logit minus the best other one; top1 in %; ece, the expected calibration error in %, over 15
        bins.
        """
        if self.train is not None:
            self.evaluate(student, self.train, watch=self.watch("train", self.train))
        found = {}
        for name, sums in self.sums.items():
            ranks = self.world.gather({key: value.cpu() for key, value in sums.items()})
            parts = [part for part in ranks if part]  # a process may have no image
            found[name] = _metrics(
                {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}
            )
        self.sums = {}
        return found


def diagnose(logits: Tensor, teacher_logits: Tensor | None, label: Tensor) -> dict[str, float]:
    """Computes the diagnostics of logits [N, C] in one process; see `Diagnostics.metrics`."""
    return _metrics(_sums(logits, teacher_logits, label))


def _sums(logits: Tensor, teacher_logits: Tensor | None, label: Tensor) -> dict[str, Tensor]:
    """Returns the sums over the images of each diagnostic, `n`, their number, and the bins of each ECE."""
    wide = sum_dtype(label.device)
    values: dict[str, Tensor] = {"n": torch.ones_like(label)}
    bins = {}
    for prefix, z in (("", logits), ("teacher_", teacher_logits)):
        if z is None:
            continue
        probability = z.softmax(1)
        confidence, first = probability.max(1)
        hit = first == label
        values[f"{prefix}p_t"] = probability.gather(1, label[:, None])[:, 0]
        values[f"{prefix}gap"], values[f"{prefix}top1"] = logit_gap(z, label), hit
        index = (confidence * _BINS).long().clamp(max=_BINS - 1)
        excess = torch.zeros(_BINS, device=z.device, dtype=wide)
        bins[f"{prefix}ece"] = excess.index_add(0, index, confidence.to(wide) - hit.to(wide))
    if teacher_logits is not None:
        values["agreement"] = logits.argmax(1) == teacher_logits.argmax(1)
        values["tckd"], values["nckd"] = dkd_samples(logits, teacher_logits, label, TEMPERATURE)
    return {name: value.to(wide).sum() for name, value in values.items()} | bins


def _metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    # ECE is Σ over bins of (share of the images) · |mean confidence − accuracy|.
    total = {name: (value.abs().sum() if value.ndim else value).item() for name, value in sums.items()}
    n = total.pop("n")
    percent = ("top1", "agreement", "ece")
    return {name: value / n * (100 if name.endswith(percent) else 1) for name, value in total.items()}
