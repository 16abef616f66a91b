"""Training metrics: sums by name, the step of a loss that is not finite, and a state within a window."""

import copy

import pytest
import torch

from mdistiller.errors import TrainingError
from mdistiller.training.distributed import World
from mdistiller.training.metrics import TrainingMetrics


class Recorded(TrainingMetrics):
    """Training metrics that keep their lines, and count the steps."""

    def __init__(self):
        self.lines, self.step = [], 0
        super().__init__(World(torch.device("cpu")), 4, self.lines.append, lambda step: 0.5)

    def take(self, steps):
        for sums in steps:
            self.step += 1
            self.add({name: torch.tensor(float(value)) for name, value in sums.items()}, self.step, 1)

    def end(self, **options):
        self.flush(self.step, 1, **options)


# A method may leave out a loss from some step on, within a window too.
STEPS = [{"task": i, "kd": 10 * i, "loss": 11 * i, "n": 2} for i in range(5)]
STEPS += [{"task": i, "loss": i, "n": 2} for i in range(5, 10)]


def test_lines_are_means_over_the_images_of_a_window():
    found = Recorded()
    found.take(STEPS)
    found.end()
    lines = found.lines
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert [line["task"] for line in lines] == [6 / 8, 22 / 8, 17 / 4]
    assert [line["loss"] for line in lines] == [66 / 8, (44 + 18) / 8, 17 / 4]
    assert [line.get("kd") for line in lines] == [60 / 8, 40 / 8, None]
    assert {line["lr"] for line in lines} == {0.5}
    assert found.epoch_means() == {"task": 45 / 20, "kd": 100 / 20, "loss": (110 + 35) / 20}
    assert found.epoch_sums == {}


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_state_within_a_window_goes_on_with_the_same_bits(cut):
    steps = [{name: value / 7 if name != "n" else 2 for name, value in one.items()} for one in STEPS]
    whole, first, second = Recorded(), Recorded(), Recorded()
    whole.take(steps)
    whole.end()
    first.take(steps[:cut])
    first.end(close=False)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.step = cut
    second.take(steps[cut:])
    second.end()
    assert first.lines + second.lines == whole.lines
    assert second.epoch_means() == whole.epoch_means()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [2, 4, 7])
def test_the_first_loss_that_is_not_finite_is_named(bad, value):
    found = Recorded()
    steps = [dict(one) for one in STEPS]
    for later in (bad - 1, bad):  # and the one after it
        steps[later]["loss"] = value
    found.take(steps[:9])
    with pytest.raises(TrainingError, match=rf"not finite: first in step {bad}; means of the steps up to"):
        found.end(close=False)  # no state is written with it, be the window full or not


def test_it_is_seen_in_the_open_window_that_a_state_would_keep():
    found = Recorded()
    found.take([*STEPS[:5], STEPS[5] | {"loss": float("nan")}])
    with pytest.raises(TrainingError, match="first in step 6; means of the steps up to 6"):
        found.end(close=False)


def test_recent_means_are_of_the_open_window_and_the_one_before():
    found, untouched = Recorded(), Recorded()
    assert found.recent() == {}
    expected = [
        {"task": 0 / 2, "kd": 0 / 2, "loss": 0 / 2},
        {"task": 1 / 4, "kd": 10 / 4, "loss": 11 / 4},
        {"task": 3 / 6, "kd": 30 / 6, "loss": 33 / 6},
        {"task": 6 / 8, "kd": 60 / 8, "loss": 66 / 8},
        {"task": 10 / 10, "kd": 100 / 10, "loss": 110 / 10},  # the window of the first four, and the fifth
    ]
    for step, means in zip(STEPS, expected, strict=False):
        found.take([step])
        assert found.recent() == pytest.approx(means)
    found.take(STEPS[5:])
    found.flush(found.step, 1, close=False)
    assert found.recent()["task"] == pytest.approx((22 + 17) / 12)
    found.end()
    untouched.take(STEPS)
    untouched.end()
    assert found.lines == untouched.lines
