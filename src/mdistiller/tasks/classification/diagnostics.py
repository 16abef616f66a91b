"""What a run transfers, on fixed images: the parts of KD, confidence, agreement, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mdistiller.data import ImageSet, Splits, make_loader
from mdistiller.data.loader import ResidentLoader, StreamLoader
from mdistiller.methods.dkd import dkd_samples, logit_gap
from mdistiller.tasks.classification.evaluate import Watch, evaluate
from mdistiller.training.distributed import World
from mdistiller.types import Batch

TEMPERATURE = 4.0
"""Of the TCKD and NCKD that are reported, whatever the method's own: so that runs compare."""
TRAIN_IMAGES = 1000
_BINS = 15  # as Guo et al., On Calibration of Modern Neural Networks, ICML 2017

Loader = ResidentLoader | StreamLoader


class Diagnostics:
    """Compares a student with its teacher on the test images, and on some unaugmented training images.

    The teacher is asked once for each image; its logits are kept.

    Args:
        teacher: gives logits; None where there is none, or where it changes as the run goes on.
        splits: the data. Training images are looked at where they are in memory.
        batch_size: images a pass.
        prepare: turns a raw batch into normalised images.
        here: this process.
        precision: autocast precision.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        splits: Splits,
        batch_size: int,
        prepare: Callable[[Batch], Batch],
        here: World,
        precision: torch.dtype,
    ) -> None:
        self.teacher, self.prepare = teacher, prepare
        self.world, self.precision = here, precision
        self.known: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}
        self.train_loader: Loader | None = None
        if isinstance(splits.train, ImageSet):
            count = min(TRAIN_IMAGES, len(splits.train))
            # Evenly over the set: some have their images sorted by class.
            chosen = torch.linspace(0, len(splits.train) - 1, count).long()
            self.train_loader = make_loader(
                splits.train.select(chosen),
                batch_size,
                device=here.device,
                shuffle=False,
                rank=here.rank,
                world_size=here.size,
            )

    def watch(self, name: str, batches: Callable[[], Iterable[Batch]]) -> Watch:
        """What `evaluate` calls with the student's logits on some images, known under a name from then on.

        Args:
            name: of the images.
            batches: the same raw batches as `evaluate` takes, again, for the teacher.
        """
        if self.teacher is not None and name not in self.known:
            known = self.known[name] = []
            teacher = self.teacher
            evaluate(
                teacher,
                batches(),
                self.prepare,
                self.world,
                precision=self.precision,
                watch=lambda i, logits, label: known.append(logits),
            )
        self.sums[name] = torch.zeros((), device=self.world.device)

        def add(i: int, logits: Tensor, label: Tensor) -> None:
            taught = self.known[name][i] if name in self.known else None
            self.sums[name] = self.sums[name] + _sums(logits, taught, label)

        return add

    def figures(self, student: nn.Module) -> dict[str, dict[str, float]]:
        """Means by name of the images: those watched since the last call, and the training images.

        agreement: % of images on which student and teacher have the same first class. tckd, nckd: at
        temperature 4, times 16, in nats. Of the student, and with `teacher_` of the teacher: p_t, the
        target's probability; gap, its logit less the best other one; ece, the expected calibration error in
        %, over 15 bins; and the teacher's top1 in %.
        """
        loader = self.train_loader
        if loader is not None:
            watch = self.watch("train", lambda: loader.epoch(0))
            evaluate(
                student, loader.epoch(0), self.prepare, self.world, precision=self.precision, watch=watch
            )
        found = {name: _figures(self.world.sum(sums).tolist()) for name, sums in self.sums.items()}
        self.sums = {}
        return found


_OF_MODEL = ("p_t", "gap", "top1")
_OF_PAIR = ("agreement", "tckd", "nckd")


def _sums(logits: Tensor, taught: Tensor | None, label: Tensor) -> Tensor:
    """[n, the student's, the teacher's, the pair's sums, and the bins of both], float64."""
    parts = [torch.full((1,), len(label), device=label.device, dtype=torch.float64)]
    bins = []
    for z in (logits, taught):
        if z is None:
            continue
        probability = z.softmax(1)
        confidence, first = probability.max(1)
        hit = first == label
        p_t = probability.gather(1, label[:, None])[:, 0]
        parts.append(torch.stack([x.double().sum() for x in (p_t, logit_gap(z, label), hit)]))
        index = (confidence * _BINS).long().clamp(max=_BINS - 1)
        excess = torch.zeros(_BINS, device=z.device, dtype=torch.float64)
        bins.append(excess.index_add(0, index, confidence.double() - hit.double()))
    if taught is not None:
        tckd, nckd = dkd_samples(logits, taught, label, TEMPERATURE)
        agree = logits.argmax(1) == taught.argmax(1)
        parts.append(torch.stack([x.double().sum() for x in (agree, tckd, nckd)]))
    return torch.cat([*parts, *bins])


def _figures(sums: list[float]) -> dict[str, float]:
    n, rest = sums[0], sums[1:]
    pair = len(rest) > len(_OF_MODEL) + _BINS
    prefixes = ("", "teacher_") if pair else ("",)
    names = [prefix + name for prefix in prefixes for name in _OF_MODEL]
    names += _OF_PAIR if pair else ()
    found = {name: value / n for name, value in zip(names, rest, strict=False)}
    # Σ over bins of (share of the images) · |mean confidence − accuracy|.
    for i, prefix in enumerate(prefixes):
        start = len(names) + i * _BINS
        found[f"{prefix}ece"] = sum(map(abs, rest[start : start + _BINS])) / n
    for name in ("top1", "teacher_top1", "agreement", "ece", "teacher_ece"):
        if name in found:
            found[name] *= 100
    return found
