"""DETRDistill and LD: assignments and losses beside numpy and scipy, and pairs of detectors."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from tiny_detectors import batch, two_stage
from tiny_sets import spread, tiny_set

from mdistiller.errors import ConfigError
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.queries import detrdistill_loss, ld_loss, match_queries

pytest.importorskip("transformers", minversion="5")


def queries(seed, count=4, images=2, classes=3):
    generator = torch.Generator().manual_seed(seed)
    boxes = 0.2 + 0.5 * torch.rand(images, count, 4, generator=generator)
    return torch.randn(images, count, classes, generator=generator), boxes


def giou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    left, right = max(ax - aw / 2, bx - bw / 2), min(ax + aw / 2, bx + bw / 2)
    top, bottom = max(ay - ah / 2, by - bh / 2), min(ay + ah / 2, by + bh / 2)
    inner = max(0, right - left) * max(0, bottom - top)
    union = aw * ah + bw * bh - inner
    width = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    height = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    return inner / union - (width * height - union) / (width * height)


def by_hand(student, teacher):
    """The losses of classes and of boxes of one pair of queries."""
    (z, box), (target, other) = student, teacher
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-target))
    classes = -(q * np.log(p) + (1 - q) * np.log(1 - p)).sum()
    return classes, 5 * np.abs(box - other).sum() + 2 * (1 - giou(box, other))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_pairs_cost_least_among_all_assignments(count):
    student, teacher = queries(0), queries(1, count)
    image, mine, his = match_queries(student, teacher)
    for i in range(2):
        cost = [
            [
                sum(
                    by_hand(
                        (student[0][i, s].numpy(), student[1][i, s].numpy()),
                        (teacher[0][i, t].numpy(), teacher[1][i, t].numpy()),
                    )
                )
                for t in range(count)
            ]
            for s in range(4)
        ]
        table = np.array(cost) if count >= 4 else np.array(cost).T
        orders = itertools.permutations(range(max(4, count)), min(4, count))
        best = min(sum(table[row, column] for row, column in enumerate(order)) for order in orders)
        pairs = list(zip(mine[image == i].tolist(), his[image == i].tolist(), strict=True))
        assert len(pairs) == min(4, count)
        assert sum(cost[s][t] for s, t in pairs) == pytest.approx(best, rel=1e-5)


def test_the_same_queries_in_another_order_have_no_distance():
    logits, boxes = queries(4)
    order = torch.tensor([2, 0, 3, 1])
    image, mine, his = match_queries((logits, boxes), (logits[:, order], boxes[:, order]))
    assert torch.equal(order[his], mine)
    far = detrdistill_loss(
        logits[image, mine], logits[:, order][image, his], boxes[image, mine], boxes[:, order][image, his]
    )
    assert far[1].item() == pytest.approx(0, abs=1e-5)


def test_the_losses_by_hand():
    (z, boxes), (target, others) = ([x[0] for x in queries(seed)] for seed in (2, 3))
    got = detrdistill_loss(z, target, boxes, others)
    rows = [
        by_hand(
            (z[i].double().numpy(), boxes[i].double().numpy()),
            (target[i].double().numpy(), others[i].double().numpy()),
        )
        for i in range(4)
    ]
    assert [x.item() for x in got] == pytest.approx(np.mean(rows, 0), rel=1e-5)
    with pytest.raises(ConfigError, match="have 3 and 2 classes"):
        match_queries(queries(0), queries(0, classes=2))


def places(center, size, bins=9):
    """Left, top, right and bottom of a box, nearer and farther: rising for the last two."""
    away = np.linspace(-0.3, 0.9, bins) * size / 2
    return torch.tensor(np.stack([center - away, center - away, center + away, center + away]))[None]


def test_ld_of_equal_places_is_the_divergence_of_the_softened_distributions():
    generator = torch.Generator().manual_seed(0)
    z, target = (3 * torch.randn(5, 4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    grid = places(0.5, 0.4).expand(5, -1, -1)
    weight = torch.rand(5, generator=generator)
    p, q = (np.exp(x.numpy() / 10) for x in (z, target))
    divergence = entropy(q, p, axis=2).mean(1) / 9 * 100
    want = (weight.numpy() * divergence).sum() / weight.sum().item()
    assert ld_loss(z, grid, target, grid, weight, 10.0).item() == pytest.approx(want, rel=1e-5)
    assert ld_loss(z, grid, z, grid, weight, 10.0).item() == pytest.approx(0, abs=1e-7)


def test_ld_compares_sides_where_they_are():
    """A teacher's box of other size, whose bins are at other places, puts its mass at the same coordinate."""
    one, other = places(0.5, 0.4), places(0.52, 0.5)
    weight = torch.ones(1)
    # The teacher is sure of its bin 4; by numpy, the student's mean coordinate is to be the same.
    target = torch.full((1, 4, 9), -1e3, dtype=torch.float64)
    target[..., 4] = 1e3
    z = torch.zeros(1, 4, 9, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = ld_loss(z, one, target, other, weight, 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    mean = (z.detach().softmax(2) * one).sum(2)
    assert mean[0].numpy() == pytest.approx(other[0, :, 4].numpy(), abs=2e-3)
    # Beyond the student's last bin there is only that bin.
    far = places(0.5, 4.0)
    target[..., 4], target[..., 8] = -1e3, 1e3
    at_end = torch.full((1, 4, 9), -1e3, dtype=torch.float64)
    at_end[..., 8] = 1e3
    assert ld_loss(at_end, one, target, far, weight, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_places_of_the_bins_are_those_of_the_boxes():
    """The expected place of each side gives transformers' own box of the last layer."""
    model = spread(tiny_set("d_fine")).eval()
    adapter = adapter_of(model)
    with torch.no_grad():
        prepared = adapter.prepare(batch()[0])
        found, out = adapter.features(prepared), adapter.run(prepared)
    left, top, right, bottom = (
        (found["queries.sides"].softmax(4) * found["queries.places"]).sum(4)[:, -1].unbind(2)
    )
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 2)
    torch.testing.assert_close(boxes, out.pred_boxes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["queries.boxes"][:, -1], out.pred_boxes)
    torch.testing.assert_close(found["queries.logits"][:, -1], out.logits)
    assert found["queries.logits"].shape[:2] == found["queries.sides"].shape[:2] == (2, 2)  # both layers
    assert not model.detr.model.decoder.training


@pytest.mark.parametrize("kind", ["detr", "yolos"])
def test_log_odds_of_a_softmax(kind):
    adapter = adapter_of(spread(tiny_set(kind)).eval())
    with torch.no_grad():
        prepared = adapter.prepare(batch()[0])
        logits, out = adapter.features(prepared)["queries.logits"], adapter.run(prepared)
    torch.testing.assert_close(logits[:, 0].sigmoid(), out.logits.softmax(2)[..., :-1], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("d_fine", "d_fine"), ("rt_detr", "d_fine"), ("detr", "rt_detr_v2"), ("d_fine", "yolos")],
)
def test_pairs_of_detectors(student, teacher):
    options = {"num_queries": 30} if teacher != "yolos" else {}
    distiller = DetectionDistiller(tiny_set(student), tiny_set(teacher, 1, **options), "detrdistill").train()
    out = distiller(*batch())
    assert {"detrdistill", "detrdistill_boxes"} <= out.losses.keys()
    out.loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters() if p.requires_grad
    )


def test_ld_takes_d_fine_alone():
    distiller = DetectionDistiller(
        spread(tiny_set("d_fine")), spread(tiny_set("d_fine", 1)), "ld+detrdistill"
    ).train()
    out = distiller(*batch())
    assert out.losses["ld"] > 0
    out.loss.backward()
    pairs = (
        (tiny_set("rt_detr"), tiny_set("d_fine"), "student"),
        (tiny_set("d_fine"), tiny_set("detr"), "teacher"),
    )
    for mine, his, whose in pairs:
        with pytest.raises(
            ConfigError, match=rf"'ld' reads 'queries.sides', which the {whose} lacks; allowed: D-FINE"
        ):
            DetectionDistiller(mine, his, "ld")
    with pytest.raises(
        ConfigError, match=r"'queries.logits', which the student lacks; allowed: detectors that predict a set"
    ):
        DetectionDistiller(two_stage(), tiny_set("detr"), "detrdistill")
