"""Reading weights: every layout that occurs, and every way a file can be wrong."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mdistiller.errors import CheckpointError, ClassCountError
from mdistiller.models import create_model, load_weights

State = dict[str, Tensor]


def small(seed: int = 0, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("resnet8", num_classes)


@pytest.fixture
def state() -> State:
    return small(1).state_dict()


def snapshot(model: nn.Module) -> State:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_loads(path: Path, expected: State) -> None:
    model = small()
    assert load_weights(model, path) is None
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def refuse(path: Path, match: str, model: nn.Module | None = None) -> None:
    """The file is refused, and the model stays what it was."""
    model = model or small()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=match):
        load_weights(model, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


LAYOUTS: dict[str, Callable[[State], object]] = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 240, "best_acc": torch.tensor([70.0])},
    "state_dict": lambda s: {"state_dict": s},
    "parallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(layout: str, zipped: bool, state: State, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_loads(tmp_path / "w.pth", state)


def test_safetensors_and_run_folder(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "student.safetensors")
    assert_loads(tmp_path / "student.safetensors", state)
    assert_loads(tmp_path, state)
    model = small()
    load_weights(model, str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_the_dtype_of_the_model(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    stored = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    torch.save(stored, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", {key: t.to(state[key].dtype) for key, t in stored.items()})


def test_missing(tmp_path: Path) -> None:
    refuse(tmp_path / "none.pt", "no such checkpoint.*none.pt")
    refuse(tmp_path, "no such checkpoint.*student.safetensors")


class Malicious:
    """A pickle of it creates a file when it is read carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.target,))


def test_code_in_a_pickle_does_not_run(state: State, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = {"model": state, "extra": Malicious(trap)}
    torch.save(content, tmp_path / "new.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    for name in ("new.pt", "old.pt", "plain.pt"):
        refuse(tmp_path / name, "refused")
    assert not trap.exists()
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert trap.exists()  # so the trap does work


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "old.pt"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_truncated(name: str, kept: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path, state)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refuse(path, name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_bit_flips(name: str, state: State, tmp_path: Path) -> None:
    """A flip is noticed, or lies in a safetensors file's numbers, which have no checksum."""
    path = tmp_path / name
    write(path, state)
    content = path.read_bytes()
    body = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(content), (25,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 0x40
        path.write_bytes(flipped)
        model = small()
        before = snapshot(model)
        try:
            load_weights(model, path)
        except CheckpointError:
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        else:
            after = model.state_dict()
            unnoticed = any(not torch.equal(after[key], state[key]) for key in state)
            assert not unnoticed or (name == "w.safetensors" and position >= body)


def write(path: Path, state: State) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.stem != "old")


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"model": {}}, {"model": 3}, {"epoch": 3}, {3: torch.ones(1)}, torch.ones(2)],
    ids=str,
)
def test_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", "no state dict")


def test_text_files(tmp_path: Path) -> None:
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        refuse(tmp_path / name, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, state: State, tmp_path: Path) -> None:
    state["layer2.0.bn1.running_var"][3] = value
    torch.save(state, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", r"layer2.0.bn1.running_var .*not finite")


def test_not_finite_in_the_dtype_of_the_model(state: State, tmp_path: Path) -> None:
    state["fc.bias"][0] = 1e6
    torch.save(state, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", "fc.bias .*not finite", small().half())


def test_another_architecture(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    refuse(
        tmp_path / "w.pt",
        r"another architecture than VGG: \d+ keys missing \(block0.0.weight, block0.0.bias, "
        r"block0.1.weight, …\); \d+ keys unexpected \(conv1.weight, bn1.weight, bn1.bias, …\)",
        create_model("vgg8", 10),
    )
    torch.save(create_model("resnet8x4", 10).state_dict(), tmp_path / "wide.pt")
    refuse(
        tmp_path / "wide.pt",
        r"conv1.weight has shape \(32, 3, 3, 3\) in the file and \(16, 3, 3, 3\) in the model",
    )


def test_another_architecture_by_the_models_name(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="another architecture than vgg8: "):
        load_weights(create_model("vgg8", 10), tmp_path / "w.pt", "vgg8")


def test_one_key_too_few(state: State, tmp_path: Path) -> None:
    del state["fc.bias"]
    torch.save(state, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", r"1 key missing \(fc.bias\)$")


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "torchvision/mobilenet_v3_small"])
def test_another_number_of_classes(name: str, tmp_path: Path) -> None:
    torch.save(create_model(name, 100).state_dict(), tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", "100 classes, the model has 10: .*num_classes=100", create_model(name, 10))


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("name", "classifiers"),
    [
        ("resnet8", ["fc"]),
        ("torchvision/mobilenet_v3_small", ["classifier.3"]),
        ("torchvision/squeezenet1_1", ["classifier.1"]),  # a convolution
        ("timm/resnet10t", ["fc"]),
        ("timm/deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
    ],
)
def test_a_new_classifier(name: str, classifiers: list[str], file: str, tmp_path: Path) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(1)
    theirs = create_model(name, 100).state_dict()
    write(tmp_path / file, theirs)
    model = create_model(name, 10)
    before = snapshot(model)
    with pytest.raises(ClassCountError) as caught:
        load_weights(model, tmp_path / file)
    assert (caught.value.theirs, caught.value.ours) == (100, 10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.warns(
        UserWarning, match="has 100 classes and is to be trained on 10: its classifier is left"
    ):
        load_weights(model, tmp_path / file, new_classifier=True)
    after = model.state_dict()
    fresh = {f"{path}.{kind}" for path in classifiers for kind in ("weight", "bias")}
    assert fresh <= after.keys()
    for key, value in after.items():
        if key in fresh:  # small: the first steps need not undo large ones
            assert not value.any() if key.endswith("bias") else 0.008 < value.std() < 0.012, key
        else:
            assert torch.equal(value, theirs[key]), key


def test_no_new_classifier_where_more_differs(tmp_path: Path) -> None:
    torch.save(create_model("resnet8x4", 100).state_dict(), tmp_path / "wide.pt")
    torch.save(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).state_dict(), tmp_path / "hidden.pt")
    hidden = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    for name, model in (("wide", small()), ("hidden", hidden)):
        with pytest.raises(CheckpointError, match="another architecture"):
            load_weights(model, tmp_path / f"{name}.pt", new_classifier=True)


# Layouts of other programs

NESTED: dict[str, Callable[[State], object]] = {
    "timm's average alone": lambda s: {"state_dict_ema": s, "epoch": 3},
    "torchvision's average alone": lambda s: {
        "model_ema": {"n_averaged": torch.tensor(7)} | with_prefix("module.", s)
    },
    "ema": lambda s: {"ema": s},
    "Lightning": lambda s: {"state_dict": with_prefix("model.", s), "epoch": 3},
    "parallel Lightning": lambda s: {"state_dict": with_prefix("module.model.", s)},
    "the student before its average": lambda s: {"model_ema": {k: v + 1 for k, v in s.items()}, "model": s},
}


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("layout", NESTED)
def test_nestings_of_other_programs(layout: str, state: State, tmp_path: Path) -> None:
    torch.save(NESTED[layout](state), tmp_path / "w.pth")
    assert_loads(tmp_path / "w.pth", state)


def test_files_of_before_2019_have_no_counters(state: State, tmp_path: Path) -> None:
    old = {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    torch.save({"state_dict": with_prefix("module.", old)}, tmp_path / "old.pth")
    model = small()
    counters = {key: t.clone() for key, t in model.state_dict().items() if key not in old}
    load_weights(model, tmp_path / "old.pth")
    assert all(torch.equal(t, (old | counters)[key]) for key, t in model.state_dict().items())


def test_one_missing_counter_is_refused(state: State, tmp_path: Path) -> None:
    del state["bn1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth")
    refuse(tmp_path / "w.pth", r"1 key missing \(bn1.num_batches_tracked\)")


def test_a_model_whose_own_keys_begin_with_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "w.pth")
    other = nn.ModuleDict({"model": nn.Linear(2, 2)})
    load_weights(other, tmp_path / "w.pth")
    assert torch.equal(other["model"].weight, model["model"].weight)
