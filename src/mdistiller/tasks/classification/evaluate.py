"""Accuracy and loss of classifiers on a test set."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.taps import logits_of
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast
from mdistiller.types import Batch

Watch = Callable[[int, Tensor, Tensor], None]
"""Takes each batch's number, float32 logits and labels."""


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Computes top-1 and top-5 accuracy in percent, and mean cross-entropy in nats.

    Args:
        model: returns logits [B, classes]; run in evaluation mode and put back into its own. With fewer than
            five classes, top-5 counts all of them.
        batches: this process's share of the test set, raw.
        prepare: turns a raw batch into normalised images.
        world: this process; sums are taken over all processes.
        precision: autocast precision.
        watch: called for each batch.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for i, raw in enumerate(batches):
                batch = prepare(raw)
                with autocast(world.device, precision):
                    logits = logits_of(model(batch.image)).float()
                hits = logits.topk(min(5, logits.shape[1])).indices == batch.label[:, None]
                loss = F.cross_entropy(logits, batch.label, reduction="sum")
                n = torch.full_like(loss, len(batch.label))
                sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, n]).double()
                if watch is not None:
                    watch(i, logits, batch.label)
    finally:
        model.train(was_training)
    top1, top5, loss, n = world.sum(sums).tolist()
    return {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "loss": loss / n}
