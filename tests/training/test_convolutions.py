"""Convolutions that a run on a CPU computes in another way than PyTorch."""

import copy
import io
import pickle

import pytest
import torch
from small_runs import make_trainer, next_batch
from torch import nn
from torch.nn.utils import prune

import mdistiller
from mdistiller.data import DataConfig, load_data
from mdistiller.models import ModelConfig
from mdistiller.models.quantize import QuantizedConv2d, train_rounded
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.convolutions import DepthwiseConv2d, Float32Conv2d, replace_slow_convolutions

BF16, FLOAT32 = torch.bfloat16, torch.float32
CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def several_threads_without_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_strided_kernels_and_the_first_layer_are_meant_and_no_other():
    model = mdistiller.create_model("resnet8x4", 10)
    before = model.state_dict()
    replace_slow_convolutions(model, BF16)
    changed = [name for name, m in model.named_modules() if isinstance(m, Float32Conv2d)]
    assert changed == ["conv1", "layer2.0.conv1", "layer3.0.conv1"]  # not the shortcuts, which are 1 x 1
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(after[key].data_ptr() == value.data_ptr() for key, value in before.items())


def test_nothing_changes_on_a_cpu_with_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = mdistiller.create_model("resnet8", 10)
    replace_slow_convolutions(model, BF16)
    assert not any(isinstance(m, Float32Conv2d) for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_values_and_gradients_are_those_of_float32_and_the_output_bfloat16(copied):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    module = nn.Sequential(copy.deepcopy(plain))
    replace_slow_convolutions(module, BF16)
    module = copied(module)
    x = torch.randn(4, 3, 9, 9)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = plain(inputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        got = module(inputs[1])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected.to(torch.bfloat16))
    weight = torch.randn_like(expected).to(torch.bfloat16)
    expected.backward(weight.float())
    got.backward(weight)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(module[0].weight.grad, plain.weight.grad)
    torch.testing.assert_close(module[0].bias.grad, plain.bias.grad)
    assert torch.equal(module(x), plain(x))  # without autocast


def test_nothing_changes_with_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = mdistiller.create_model("resnet8", 10)
    replace_slow_convolutions(model, BF16)
    assert not any(isinstance(m, Float32Conv2d) for m in model.modules())


def test_evaluation_is_that_of_a_model_that_did_not_change():
    plain = mdistiller.create_model("MobileNetV2", 10).eval()
    changed = copy.deepcopy(plain)
    replace_slow_convolutions(changed, BF16)
    assert {Float32Conv2d, DepthwiseConv2d} <= {type(m) for m in changed.modules()}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert torch.equal(changed(x), plain(x))


def test_no_convolution_of_a_residual_net_changes_in_float32():
    model = mdistiller.create_model("resnet8", 10)
    replace_slow_convolutions(model, FLOAT32)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


@pytest.mark.parametrize("precision", [FLOAT32, BF16])
def test_depthwise_kernels_are_meant(precision):
    model = mdistiller.create_model("ShuffleV1", 10)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    expected = {name for name in convolutions if name.endswith("conv2")}
    assert len(expected) == 16
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    replace_slow_convolutions(model, precision)
    assert {name for name, m in convolutions.items() if isinstance(m, DepthwiseConv2d)} == expected
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 6, "kernel_size": 3},  # without padding
        {"groups": 6, "kernel_size": 4, "padding": 2},
        {"groups": 6, "kernel_size": (3, 5), "padding": (1, 2)},
        {"groups": 6, "kernel_size": 3, "padding": 2, "dilation": 2},
        {"groups": 6, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"groups": 6, "kernel_size": 3, "padding": "same"},
        {"groups": 3, "kernel_size": 3, "padding": 1},
        {"groups": 3, "kernel_size": 1},
        {"groups": 6, "kernel_size": 1},
        {"groups": 1, "kernel_size": 1},
    ],
)
def test_other_convolutions_stay(options):
    model = nn.Sequential(nn.Conv2d(6, 6, **options))
    replace_slow_convolutions(model, FLOAT32)
    assert type(model[0]) is nn.Conv2d


# (inputs, outputs, kernel, stride, groups, height, width)
SLOW = [
    (6, 6, 3, 1, 6, 2, 2),
    (6, 6, 3, 1, 6, 1, 4),
    (6, 6, 3, 2, 6, 4, 3),
    (6, 6, 5, 1, 6, 9, 7),
    (6, 6, 5, 1, 6, 3, 3),
    (6, 6, 5, 2, 6, 10, 7),
    (6, 6, 7, 1, 6, 8, 8),
    (6, 6, 9, 2, 6, 5, 12),
]


def pair(case, dtype, bias=False):
    """A convolution, its twin of the other class, and an input, all in channels_last."""
    inputs, outputs, kernel, stride, groups, height, width = case
    torch.manual_seed(0)
    plain = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias, dtype=dtype)
    plain.to(memory_format=CHANNELS_LAST)
    twin = nn.Sequential(copy.deepcopy(plain))
    replace_slow_convolutions(twin, FLOAT32)
    x = torch.randn(3, inputs, height, width, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
    return plain, twin[0], x


def gradients(module, x, grad=None):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.backward(torch.cos(y.detach()) if grad is None else grad)
    return y, [x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", SLOW)
def test_gradients_are_those_of_torch(case, bias):
    plain, twin, x = pair(case, torch.float64, bias)
    (expected, wanted), (y, found) = gradients(plain, x), gradients(twin, x)
    assert torch.equal(y, expected)
    assert type(y.grad_fn).__name__ == "_DepthwiseBackward"
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(twin(x), plain(x))


@pytest.mark.parametrize("case", [(2, 2, 5, 2, 2, 4, 5), (2, 2, 3, 1, 2, 2, 2)])
def test_first_and_second_derivatives_are_finite_differences(case):
    _, twin, x = pair(case, torch.float64)
    inputs = x[:1].requires_grad_(), twin.weight
    function = lambda a, w: torch.func.functional_call(twin, {"weight": w}, a)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("case", SLOW)
def test_bfloat16_gradients_are_those_of_float32_rounded(case):
    plain, twin, x = pair(case, FLOAT32)
    with torch.no_grad():
        for p in (plain.weight, twin.weight, x):
            p.copy_(p.to(BF16))
    with torch.autocast("cpu", BF16):
        y, found = gradients(twin, x, torch.ones(()).expand(twin(x).shape).to(BF16))
    assert y.dtype == BF16
    assert type(y.grad_fn).__name__ == "_DepthwiseBackward"
    _, wanted = gradients(plain, x, torch.ones_like(y, dtype=FLOAT32))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == FLOAT32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [((6, 6, 3, 1, 6, 4, 4), FLOAT32), ((6, 6, 3, 2, 6, 8, 8), FLOAT32), ((6, 6, 5, 1, 6, 12, 12), FLOAT32)],
)
def test_quick_shapes_are_left_to_torch(case, dtype):
    _, twin, x = pair(case, dtype)
    assert isinstance(twin, DepthwiseConv2d)
    assert type(twin(x.requires_grad_()).grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", [SLOW[0], SLOW[5]])
def test_compiles_whole(case):
    torch.compiler.reset()
    plain, twin, x = pair(case, FLOAT32)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    (_, wanted), (y, found) = gradients(plain, x), gradients(compiled, x)
    assert y.shape[1] == twin.out_channels
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def net():
    """A stem, a strided depthwise 5x5 and a depthwise 7x7 convolution."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 5, 2, 2, groups=6), nn.Conv2d(6, 6, 7, 1, 3, groups=6)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not export to ONNX")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_changed_model_exports_as_an_ordinary_one(tmp_path):
    plain, x = net().eval(), torch.randn(2, 3, 10, 10)
    changed = copy.deepcopy(plain)
    replace_slow_convolutions(changed, FLOAT32)
    assert [type(m) for m in changed[1:3]] == [DepthwiseConv2d] * 2
    with torch.no_grad():
        program, expected = torch.export.export(changed, (x,)), plain(x)
    torch.testing.assert_close(program.module()(x), expected)
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in operations
    assert not any("backward" in name for name in operations)
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, (x,), tmp_path / "m.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_quantisation_aware_layers_stay_and_pruned_weights_get_no_gradient():
    model = net()
    train_rounded(model)
    replace_slow_convolutions(model, FLOAT32)
    assert [type(m) for m in model[:3]] == [QuantizedConv2d] * 3
    model = net()
    replace_slow_convolutions(model, FLOAT32)
    prune.l1_unstructured(model[1], "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3, 10, 10)).square().sum().backward()
    off = model[1].weight_mask == 0
    assert off.sum() == 75
    assert not model[1].weight_orig.grad[off].any()
    assert model[1].weight_orig.grad[~off].any()
    optimizer.step()
    model(torch.randn(2, 3, 10, 10))
    assert not model[1].weight[off].any()


# Runs


def trainer(fast, precision="bfloat16"):
    data = DataConfig(kind="synthetic", synthetic_samples=16, synthetic_classes=4, image_size=16)
    config = ClassificationConfig(
        data=data, student=ModelConfig(name="MobileNetV2"), batch_size=8, epochs=2, device="cpu"
    )
    config = config.replace(precision=precision, layout="channels_last", fast_convolutions=fast)
    torch.manual_seed(0)
    return make_trainer(config, load_data(data), mdistiller.create_model("MobileNetV2", 4), None)


def run_epoch(made):
    made.distiller.train()
    for _ in range(len(made.source.loader)):
        made.train_step(*next_batch(made, made.step))


def test_a_run_has_them_unless_it_is_told_otherwise():
    classes = [{type(m) for m in trainer(fast).distiller.modules()} for fast in (True, False)]
    assert DepthwiseConv2d in classes[0]
    assert not classes[1] & {DepthwiseConv2d, Float32Conv2d}


def test_a_run_trains_as_torch_does_and_resumes_with_the_same_bits():
    whole, plain = trainer(True, "float32"), trainer(False, "float32")
    run_epoch(whole)
    run_epoch(plain)
    expected = plain.distiller.state_dict()
    for key, value in whole.distiller.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)
    whole, resumed = trainer(True), trainer(True)
    run_epoch(whole)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run_epoch(whole)
    run_epoch(resumed)
    expected = whole.distiller.state_dict()
    for key, value in resumed.distiller.state_dict().items():
        assert torch.equal(value, expected[key]), key
