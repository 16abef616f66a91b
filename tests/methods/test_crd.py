"""CRD: its loss by loops, whom it draws, and what it remembers."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.autograd import gradcheck

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import crd_loss
from mdistiller.methods import CRDConfig
from mdistiller.types import Batch, Outputs

CONTRACT = {"plain SGD"}

SIZES = (5, 20, 15)
LABELS = torch.tensor(np.random.default_rng(0).permutation(np.repeat(np.arange(3), SIZES)))
MEMBERS = [torch.eq(LABELS, label) for label in range(3)]


def build(labels=LABELS, **settings):
    torch.manual_seed(0)
    models = (mdistiller.create_model(name, num_classes=3) for name in ("resnet8", "vgg8"))
    config = CRDConfig(**{"negatives": 6, "feature_dim": 8} | settings)
    return mdistiller.Distiller(*models, config, labels=labels).method.train()


def call(method, index, seed=0):
    """One pass on random features; gives these too."""
    torch.manual_seed(seed)
    s, t = torch.randn(len(index), 64, requires_grad=True), torch.randn(len(index), 512)
    logits = torch.randn(len(index), 3)
    batch = Batch(torch.empty(len(index), 3, 32, 32), LABELS[index], index)
    losses = method(Outputs(logits, {"pooled": s}), Outputs(logits, {"pooled": t}), batch, torch.tensor(1.0))
    return losses["crd"], s, t


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embed(layer, x):
    return unit(layer(x).detach().numpy().astype(float))


# The loss


def test_value_is_the_formula_s():
    rng = np.random.default_rng(0)
    positive, negatives = rng.normal(size=4), rng.normal(size=(4, 5))
    total = 0.0
    for b in range(4):
        h = math.exp(positive[b]) / (math.exp(positive[b]) + 5 / 30)
        total -= math.log(h)
        for k in range(5):
            h = math.exp(negatives[b, k]) / (math.exp(negatives[b, k]) + 5 / 30)
            total -= math.log(1 - h)
    got = crd_loss(torch.tensor(positive), torch.tensor(negatives), num_data=30).item()
    assert got == pytest.approx(total / 4, rel=1e-12)


def test_bad_input():
    with pytest.raises(ConfigError, match=r"\[B\] and \[B, K\].*got \[4\], \[3, 5\] and 30"):
        crd_loss(torch.randn(4), torch.randn(3, 5), num_data=30)
    with pytest.raises(ConfigError, match="K ≥ 1"):
        crd_loss(torch.randn(4), torch.randn(4, 0), num_data=30)
    with pytest.raises(ConfigError, match=r"method 'crd' .*needs the class of every training image: labels"):
        build(labels=None)
    with pytest.raises(ConfigError, match="all labels are of one class"):
        build(labels=torch.ones(9, dtype=torch.int64))
    with pytest.raises(ConfigError, match="one pair of features"):
        build(student_taps=("stage1", "pooled"), teacher_taps=("stage1", "pooled"))
    with pytest.raises(ValidationError, match="exact"):
        CRDConfig(mode="relax")


# Whom it draws


def draws(method, steps):
    """Draws for all images at several steps: [steps, N, 1 + K]."""
    method.step.zero_()
    found = []
    for _ in range(steps):
        found.append(method.draw(torch.arange(len(LABELS))))
        method.step.add_(1)
    return torch.stack(found)


@pytest.mark.parametrize("negatives", [6, 20, 21, 50])
def test_negatives_are_of_other_classes_and_uniform(negatives):
    steps = 300
    chosen = draws(build(negatives=negatives), steps)[:, :, 1:]
    assert chosen.shape == (steps, 40, negatives)
    assert not (LABELS[chosen] == LABELS[None, :, None]).any()
    # 20 images are of no other than the largest class; all different up to there.
    distinct = (chosen.sort(2).values.diff(dim=2) > 0).all()
    assert distinct == (negatives <= 20)
    for label, size in enumerate(SIZES):
        of_class = chosen[:, MEMBERS[label]].flatten()
        expected = len(of_class) / (40 - size)
        counts = torch.bincount(of_class, minlength=40)[~MEMBERS[label]]
        # Without replacement the counts vary less, so the bound is a bound for both.
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        degrees = 40 - size - 1
        assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_samples_and_steps_draw_independently():
    method = build(negatives=10)
    chosen = torch.zeros(100, 40, 40).scatter_(2, draws(method, 100)[:, :, 1:], 1.0)
    # The second class has 20 images, and as many are of others: each draws half of them.
    rows = chosen[:, MEMBERS[1]][..., ~MEMBERS[1]].flatten(0, 1) - 0.5
    pairs = len(rows) * (len(rows) - 1)
    correlation = (rows @ rows.T).fill_diagonal_(0) / 5
    # What independent draws would have: mean 0 and variance 1/19.
    assert abs(correlation.sum().item() / pairs) < 1e-3
    assert correlation.square().sum().item() / pairs == pytest.approx(1 / 19, rel=0.02)


def test_positives():
    everyone = torch.arange(40)
    assert torch.equal(draws(build(), 3)[:, :, 0], everyone.expand(3, 40))
    for negatives in (6, 50):
        chosen = draws(build(mode="relaxed", negatives=negatives), 300)[:, :, 0]
        assert torch.equal(LABELS[chosen], LABELS.expand(300, 40))
        for label, size in enumerate(SIZES):
            counts = torch.bincount(chosen[:, MEMBERS[label]].flatten(), minlength=40)[MEMBERS[label]]
            chi_square = ((counts - 300) ** 2 / 300).sum().item()
            assert chi_square < size - 1 + 5 * math.sqrt(2 * (size - 1))


@pytest.mark.parametrize(("mode", "negatives"), [("exact", 6), ("relaxed", 50)])
def test_a_sample_draws_the_same_wherever_it_stands(mode, negatives):
    method = build(mode=mode, negatives=negatives)
    index = torch.randperm(40)[:12]
    whole = method.draw(index)
    halves = torch.cat([method.draw(index[6:]), method.draw(index[:6])])
    assert torch.equal(whole[:, 0].roll(6), halves[:, 0])
    assert torch.equal(whole.roll(6, 0).sort(1).values, halves.sort(1).values)


# The method


def test_a_step_is_the_formula_s():
    method = build(negatives=6, weight=2.0, temperature=0.2)
    index = torch.tensor([3, 11, 30, 0])
    chosen = method.draw(index)
    memories = [m.clone().numpy().astype(float) for m in (method.teacher_memory, method.student_memory)]
    loss, s, t = call(method, index)
    total = 0.0
    embeddings = embed(method.student_embed, s), embed(method.teacher_embed, t)
    for x, memory in zip(embeddings, memories, strict=True):
        e = np.array([[math.exp(x[b] @ memory[j] / 0.2) for j in chosen[b].tolist()] for b in range(4)])
        p = e / (e.mean() * 40)
        total -= (np.log(p[:, 0] / (p[:, 0] + 6 / 40)) + np.log(6 / 40 / (p[:, 1:] + 6 / 40)).sum(1)).mean()
    assert loss.item() == pytest.approx(2 * total, rel=1e-5)


@pytest.mark.parametrize("settings", [{"negatives": 6}, {"negatives": 50, "mode": "relaxed"}])
def test_gradient_of_the_method(settings):
    method = build(**settings)
    index = torch.tensor([3, 11, 30])
    call(method, index)  # sets the constants
    method.double().eval()
    logits = torch.randn(3, 3)
    batch = Batch(torch.empty(3, 3, 32, 32), LABELS[index], index)

    def loss(s, t):
        outputs = Outputs(logits, {"pooled": s}), Outputs(logits, {"pooled": t})
        return method(*outputs, batch, torch.tensor(1.0))["crd"]

    inputs = [torch.randn(3, width, dtype=torch.float64, requires_grad=True) for width in (64, 512)]
    assert gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.slow
def test_compiled_steps_are_eager_ones():
    # Reads of memory and steps must not move behind their updates, as compiled backward passes may do.
    eager, compiled = build(mode="relaxed", negatives=50), build(mode="relaxed", negatives=50)
    compiled.compile(fullgraph=True)
    for first in (0, 4):
        index = torch.arange(first, first + 4)
        loss, s, _ = call(eager, index)
        other, same, _ = call(compiled, index)
        torch.testing.assert_close(other, loss)
        wrt = torch.autograd.grad(loss, [s, *eager.parameters()])
        torch.testing.assert_close(torch.autograd.grad(other, [same, *compiled.parameters()]), wrt)


def test_memory_mixes_and_normalizes():
    method = build(momentum=0.3)
    before = method.student_memory.clone(), method.teacher_memory.clone()
    index = torch.tensor([3, 11, 30])
    _, s, t = call(method, index)
    news = embed(method.student_embed, s), embed(method.teacher_embed, t)
    for old, now, new in zip(before, (method.student_memory, method.teacher_memory), news, strict=True):
        np.testing.assert_allclose(now[index], unit(0.3 * old[index].numpy() + 0.7 * new), atol=1e-6)
        others = [i for i in range(40) if i not in index]
        assert torch.equal(now[others], old[others])


def test_of_a_sample_that_comes_twice_the_first_counts():
    method, other = build(), build()
    call(method, torch.tensor([7, 2, 7, 7]))
    call(other, torch.tensor([7, 2, 8, 9]))
    assert torch.equal(method.student_memory[7], other.student_memory[7])
    assert torch.equal(method.teacher_memory[[7, 2]], other.teacher_memory[[7, 2]])


def test_nothing_is_remembered_in_evaluation():
    method = build().eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    first, *_ = call(method, torch.arange(4))
    assert torch.equal(call(method, torch.arange(4))[0], first)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


def test_normalization_constants_are_the_first_batch_s():
    method = build()
    call(method, torch.arange(4))
    first = method.log_z.clone()
    assert (first != 0).all()
    call(method, torch.arange(4, 8), seed=1)
    assert torch.equal(method.log_z, first)
    assert method.step == 2


def test_a_restored_method_goes_on_as_the_first_would():
    first = build()
    call(first, torch.arange(4))
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert {"student_memory", "teacher_memory", "log_z", "seed", "step"} <= state.keys()
    assert not {"classes", "by_class", "starts", "sizes"} & state.keys()
    second = build()
    torch.nn.init.zeros_(second.student_memory)
    second.seed.add_(1)
    second.load_state_dict(state)
    index = torch.arange(8, 14)
    assert torch.equal(call(first, index)[0], call(second, index)[0])


def test_embeddings_fit_and_the_memory_is_no_parameter():
    method = build(feature_dim=16)
    assert {n: tuple(p.shape) for n, p in method.named_parameters()} == {
        "student_embed.weight": (16, 64),
        "student_embed.bias": (16,),
        "teacher_embed.weight": (16, 512),
        "teacher_embed.bias": (16,),
    }
    assert method.student_memory.shape == method.teacher_memory.shape == (40, 16)
    assert method.student_memory.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
