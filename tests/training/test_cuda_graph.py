"""The captured step, less the GPU: what stands for a capture runs the step on its static inputs."""

import warnings

import pytest
import torch
from small_runs import make_trainer, step_on

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.errors import ConfigError
from mdistiller.methods import CRDConfig, DKDConfig, method_config
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.cuda_graph import WARMUP, StepGraph, record, wants_graph
from mdistiller.training.distributed import World
from mdistiller.training.step import TrainStep, update_average
from mdistiller.types import Batch, Outputs

CPU, GPU = World(torch.device("cpu")), World(torch.device("cuda"))
DATA = DataConfig(kind="synthetic", synthetic_samples=44, synthetic_classes=4, image_size=8)


def config(**changes):
    settings = {
        "data": DATA,
        "augment": AugmentConfig(padding=1),
        "student": ModelConfig(name="resnet8"),
        "method": DKDConfig(warmup=0.5, beta=1.0),
        # Halves of a power of two: float32 has them exactly.
        "optim": OptimConfig(lr=2**-5, gamma=0.5),
        "batch_size": 8,
        "epochs": 3,
        "device": "cpu",
        "cuda_graph": "auto",
    }
    return ClassificationConfig(**(settings | changes))


def stand_in(spoil=lambda result: result):
    """A capture for the CPU: the step runs again, on the static inputs, into the same result."""

    def capture(step):
        state = before()
        with torch.random.fork_rng([]):
            result = step()
        back(state)  # a capture computes nothing
        result = result.clone()

        def replay():
            result.copy_(spoil(step()))

        return result, replay

    def before():
        return {id(x): x.detach().clone() for values in capture.state().values() for x in values}

    def back(state):
        with torch.no_grad():
            for values in capture.state().values():
                for x in values:
                    x.copy_(state[id(x)])

    return capture


def warm(step):
    return step(), False


def trainer(graph, capture=None, warm=warm, **changes):
    c = config(**changes)
    torch.manual_seed(0)
    student, teacher = mdistiller.create_model("resnet8", 4), mdistiller.create_model("resnet14", 4)
    t = make_trainer(c, load_data(c.data), student, teacher, CPU)
    into(t, graph, capture or stand_in(), warm)
    return t


def into(t, graph, capture, warm=warm):
    """Give a trainer the step that is meant for a GPU: captured, or as it is."""
    t.update = TrainStep(t.config, t.learner, t.ema, CPU, t.task.batch_metrics, graph=True)
    if not graph:
        t.update.graph = None
        return
    g = t.update.graph
    capture.state = g.state
    t.update.graph = StepGraph(g.step, g.state, g.training, warm=warm, capture=capture)


def steps(t, epochs=3):
    """Each step's figures, and all that training has changed."""
    t.learner.train()
    sums = [step_on(t, raw) for epoch in range(epochs) for raw in t.source.loader.epoch(epoch)]
    return sums, [x.clone() for values in t.update._changing().values() for x in values]


def assert_same(a, b):
    for one, other in zip(a[0], b[0], strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": OptimConfig(lr=2**-5, gamma=0.5, nesterov=True, clip_norm=0.5, accumulate=2), "ema": 0.9},
        {"method": method_config("fitnet")},
        {"method": CRDConfig(negatives=4)},
        {"method": method_config("mlkd")},
        {"augment": AugmentConfig(padding=1, mixup_alpha=0.2)},
    ],
)
def test_replays_give_the_bits_of_the_step_as_it_is(changes):
    graphed = trainer(True, **changes)
    assert_same(steps(graphed), steps(trainer(False, **changes)))
    assert graphed.update.graph.replay is not None
    # The epoch's last batch has 4 images: it never was captured.
    assert list(graphed.update.graph.seen.values()) == [WARMUP + 1]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_rate_as_a_tensor_is_the_rate(name):
    optim = OptimConfig(name=name, lr=2**-6, gamma=0.5, nesterov=name == "sgd")
    ends = {}
    for kind in ("tensor", "fused", "plain"):
        t = trainer(False, optim=optim, ema=0.5)
        if kind != "tensor":
            t.update = TrainStep(t.config, t.learner, t.ema, CPU, t.task.batch_metrics)
            t.update.optimizer.param_groups[0]["fused"] = kind == "fused"
        ends[kind] = steps(t)
    assert_same(ends["tensor"], ends["fused"])
    # The unfused form rounds in another order.
    for a, b in zip(ends["tensor"][1], ends["plain"][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_dropout_draws_as_it_does_without():
    student = ModelConfig(name="wrn_16_1", options={"dropout": 0.5})
    ends = []
    for graph in (True, False):
        torch.manual_seed(0)
        model = mdistiller.create_model(student.name, 4, **student.options)
        teacher = mdistiller.create_model("resnet14", 4)
        t = make_trainer(config(student=student), load_data(DATA), model, teacher, CPU)
        into(t, graph, stand_in())
        ends.append(steps(t))
    assert_same(*ends)


def test_figures_are_not_overwritten_by_the_next_replay():
    t = trainer(True)
    sums, _ = steps(t)
    assert len({float(one["loss"]) for one in sums}) == len(sums)


def test_a_state_goes_on_in_either_form():
    whole = steps(trainer(False))[1]
    for first, second in ((True, False), (False, True), (True, True)):
        a = trainer(first)
        raws = [raw for epoch in range(3) for raw in a.source.loader.epoch(epoch)]
        a.learner.train()
        for raw in raws[:10]:
            step_on(a, raw)
        b = trainer(second)
        b.load_state_dict(a.state_dict())
        assert b.step == 10
        b.learner.train()
        # A graph made before the state was loaded holds other tensors.
        for raw in raws[10:]:
            step_on(b, raw)
        end = [x for values in b.update._changing().values() for x in values]
        assert all(torch.equal(x, y) for x, y in zip(end, whole, strict=True))
        if second:
            assert isinstance(b.update.optimizer.param_groups[0]["lr"], torch.Tensor)
            assert b.update.graph.replay is not None


def test_loading_a_state_drops_the_graph():
    t = trainer(True)
    steps(t)
    t.load_state_dict(t.state_dict())
    assert t.update.graph.replay is None


def test_a_step_that_waits_has_no_graph():
    t = trainer(True, warm=lambda step: (step(), True))
    with pytest.warns(UserWarning, match="no graph for this run's steps: a step waits for the device"):
        found = steps(t)
    assert t.update.graph.failed
    assert_same(found, steps(trainer(False)))


def test_waiting_in_the_first_steps_alone_does_no_harm():
    calls = []

    def once(step):
        calls.append(1)
        return step(), len(calls) == 1

    t = trainer(True, warm=once)
    steps(t)
    assert len(calls) == WARMUP
    assert t.update.graph.replay is not None


def test_a_capture_that_fails_leaves_the_step_as_it_is():
    def capture(step):
        step()  # changes the state, as a failing capture does not; undone below
        back()
        for p in t.learner.parameters():
            p.grad = torch.ones_like(p)  # of the step that was broken off
        raise RuntimeError("operation not permitted when stream is capturing")

    def back():
        with torch.no_grad():
            for kind, values in capture.state().items():
                for x, y in zip(values, saved[kind], strict=True):
                    x.copy_(y)

    t = trainer(True, capture)
    saved = {}

    def keep(step, inner=t.update.graph.warm):
        result = inner(step)
        saved.update({k: [x.detach().clone() for x in v] for k, v in t.update._changing().items()})
        return result

    t.update.graph.warm = keep
    with pytest.warns(UserWarning, match="the capture failed: operation not permitted"):
        found = steps(t)
    assert_same(found, steps(trainer(False)))


def test_too_little_memory_for_the_comparison_leaves_the_step_as_it_is():
    t = trainer(True)
    made = t.update.graph
    step, inner = made.step, made.capture
    captured = []

    def capture(captured_step):
        result = inner(captured_step)
        captured.append(1)
        return result

    def without_memory(batch, teacher):
        found = step(batch, teacher)
        if captured == [1]:  # the first step after the capture has changed all before it fails
            captured.append(2)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    made.capture, made.step = capture, without_memory
    with pytest.warns(UserWarning, match="the capture failed: CUDA out of memory"):
        found = steps(t)
    assert captured == [1, 2]
    assert made.failed
    assert made.replay is None
    assert_same(found, steps(trainer(False)))


@pytest.mark.parametrize("ended", [True, False])
def test_a_capture_that_the_device_has_ended_is_cleared_away(monkeypatch, ended):
    """torch's end of it raises before it has given back its stream and its memory."""
    calls = []

    class Capture:
        def __init__(self, graph, pool, stream):
            calls.append(("capture", pool, stream))

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(device, pool):
        calls.append(("end", device, pool))
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    cuda = {
        "CUDAGraph": lambda: None,
        "graph": Capture,
        "graph_pool_handle": lambda: (1, 2),
        "current_stream": lambda: "here",
        "current_device": lambda: 0,
        "set_stream": lambda stream: calls.append(("back", stream)),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr("mdistiller.training.cuda_graph._side_stream", lambda index: "side")
    with pytest.raises(RuntimeError, match="previous error"):
        record(lambda: None)
    assert calls == [("capture", (1, 2), "side"), ("back", "here"), ("end", 0, (1, 2))]


@pytest.mark.parametrize("wrong", ["rate", "input", "figures"])
def test_a_graph_that_computes_something_else_is_not_used(wrong):
    t = trainer(True)
    graph = t.update.graph
    inner = graph.capture

    def capture(step):
        result, replay = inner(step)

        def other():
            if wrong == "rate":  # frozen at the capture
                rate = t.update.optimizer.param_groups[0]["lr"]
                kept = rate.clone()
                rate.mul_(0.5)
                replay()
                rate.copy_(kept)
            elif wrong == "input":
                graph.inputs[0].zero_()
                replay()
            else:
                replay()
                result.mul_(2)

        return result, other

    graph.capture = capture
    with pytest.warns(UserWarning, match="its first replay differs from the step"):
        found = steps(t)
    assert graph.failed
    assert_same(found, steps(trainer(False)))


def test_evaluation_mode_has_no_part_in_the_graph():
    t = trainer(True)
    raw = next(t.source.loader.epoch(0))
    steps(t)
    t.learner.eval()
    before = t.student.bn1.running_mean.clone()
    step_on(t, raw)
    assert torch.equal(t.student.bn1.running_mean, before)


def test_the_average_follows_the_formula():
    torch.manual_seed(0)
    model = mdistiller.create_model("resnet8", 4)
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    expected = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    for step in range(1, 4):
        model(torch.randn(2, 3, 8, 8))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        update_average(ema, model, 0.75)
        for name, value in model.state_dict().items():
            expected[name] = (
                0.75 * expected[name] + 0.25 * value.numpy()
                if value.is_floating_point()
                else value.numpy().copy()
            )
        assert ema.n_averaged == step
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, torch.as_tensor(expected[name]), msg=name)


# Where there is a graph


def test_auto_is_on_where_it_can_be():
    images = load_data(DATA).train
    streamed = load_data(DATA.model_copy(update={"memory": "stream", "workers": 0})).train
    assert wants_graph(config(), images, GPU)
    assert not wants_graph(ClassificationConfig(student=ModelConfig(name="resnet8")), images, GPU)
    assert wants_graph(config(cuda_graph="on"), images, GPU)
    assert not wants_graph(config(cuda_graph="off"), images, GPU)
    for changes, kind, here, reason in (
        ({}, images, CPU, "it needs a GPU"),
        ({}, images, World(torch.device("cuda"), 0, 2), "it needs a single process"),
        ({"optim": OptimConfig(name="dot", delta=0.05)}, images, GPU, "DOT"),
        ({"precision": "float16"}, images, GPU, "float16"),
        ({}, streamed, GPU, "images have to be in memory"),
    ):
        assert not wants_graph(config(**changes), kind, here)
        with pytest.raises(ConfigError, match=f"cuda_graph: .*{reason}"):
            wants_graph(config(cuda_graph="on", **changes), kind, here)
    for changes in ({"deterministic": True}, {"plugins": ("examples/my_feature_method.py",)}):
        c = config().model_copy(update=changes)
        assert not wants_graph(c, images, GPU)
        assert wants_graph(c.model_copy(update={"cuda_graph": "on"}), images, GPU)


def test_on_a_cpu_on_is_an_error():
    with pytest.raises(ConfigError, match="cuda_graph: it needs a GPU; allowed here are auto and off"):
        trainer(False, cuda_graph="on")
    assert trainer(False, cuda_graph="auto").update.graph is None


def test_shapes_and_names_tell_batches_apart():
    seen = []

    def step(batch, teacher):
        seen.append(sorted(teacher.features))
        return {"loss": batch.image.sum() + sum(x.sum() for x in teacher.features.values())}

    graph = StepGraph(step, lambda: {"parameters": []}, lambda: True, warm=warm, capture=None)
    batch = Batch(torch.ones(2, 3, 4, 4), torch.zeros(2), torch.zeros(2))
    for features in ({}, {"a": torch.ones(2)}, {"b": torch.ones(2)}):
        graph(batch, Outputs(torch.zeros(0), features))
    assert list(graph.seen.values()) == [1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph(batch, Outputs(torch.zeros(0), {}))["loss"] == 96
