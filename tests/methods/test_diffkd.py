"""DiffKD against numbers of the authors' code, and its denoising against the formula by numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.methods import get_method
from mdistiller.methods.diffkd import Diffusion, kept_signal
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = {"noise"}

DATA = DataInfo((3, 32, 32))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def build(student="resnet8", teacher="resnet8", **settings):
    method = get_method("diffkd")
    return method(method.Config(**settings), create_model(student, 10), create_model(teacher, 10), DATA)


def losses(method, s, t, student_logits, teacher_logits):
    outputs = (Outputs(student_logits, {"last_map": s}), Outputs(teacher_logits, {"last_map": t}))
    batch = Batch(s, torch.zeros(len(s), dtype=torch.int64), torch.arange(len(s)))
    return method(*outputs, batch, torch.tensor(1.0))


def filled(method):
    """Parameters and inputs of the numbers below."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in method.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) * 0.4 - 0.2)
    maps = [torch.randn(6, 64, 8, 8, generator=generator) for _ in range(2)]
    return *maps, *(2 * torch.randn(6, 10, generator=generator) for _ in range(2))


def test_losses_are_those_of_the_authors_code():
    method = build()
    inputs = filled(method)
    torch.manual_seed(7)
    got = losses(method, *inputs)
    expected = {
        "diffkd_features": 0.04682640731334686,
        "diffkd_logits": 1.2099041938781738,
        "diffkd_noise": 1.8272044658660889,
        "diffkd_autoencoder": 1.0224860906600952,
    }
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected, rel=1e-5)
    weights = {"feature_weight": 2.0, "logit_weight": 3.0, "noise_weight": 4.0, "autoencoder_weight": 5.0}
    weighted = build(**weights)
    weighted.load_state_dict(method.state_dict())
    torch.manual_seed(7)
    for (name, value), weight in zip(losses(weighted, *inputs).items(), weights.values(), strict=True):
        assert value.item() == pytest.approx(weight * expected[name], rel=1e-5)


class Known(nn.Module):
    """Stands for the layers that predict the noise."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize("steps", [1, 5])
def test_denoising_is_the_formula_s(steps):
    model = Diffusion(3, 4, spatial=True, steps=steps)
    model.align = model.project = nn.Identity()
    model.noise = Known(0.3)
    x = torch.randn(2, 4, 5, 5)
    torch.manual_seed(3)
    got = model.denoise(x).detach().numpy()
    torch.manual_seed(3)
    noise = torch.randn(2, 4, 5, 5).numpy()
    share = model.share(model.adapter(x).flatten(1)).softmax(1)[:, 0].detach().numpy()[:, None, None, None]
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(kept_signal().numpy(), signal, rtol=1e-4)
    z = share * x.numpy() + (1 - share) * noise
    stride = 1000 // (2 * steps)
    for step in reversed(range(steps)):
        now, before = signal[step * stride], signal[(step - 1) * stride] if step else 1.0
        time = model.time.weight[step * stride].detach().numpy()[:, None, None]
        predicted = 0.3 * (z + time)
        clean = (z - np.sqrt(1 - now) * predicted) / np.sqrt(now)
        z = np.sqrt(before) * clean + np.sqrt(1 - before) * predicted
    np.testing.assert_allclose(got, z, rtol=1e-4, atol=1e-5)


def test_the_noise_loss_is_the_formula_s():
    model = Diffusion(3, 4, spatial=False, steps=5)
    nn.init.zeros_(model.time.weight)
    model.noise = Known(0.5)
    t = torch.randn(64, 4, 1, 1)
    torch.manual_seed(3)
    got = model.noise_loss(t).item()
    torch.manual_seed(3)
    noise, time = torch.randn(64, 4, 1, 1), torch.randint(0, 1000, (64,))
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[time][:, None, None, None]
    predicted = (np.sqrt(signal) * t.numpy() + np.sqrt(1 - signal) * noise.numpy()) / 2
    assert got == pytest.approx(((predicted - noise.numpy()) ** 2).mean(), rel=1e-4)


def test_only_its_own_loss_trains_the_autoencoder():
    method = build(autoencoder_weight=0.0, latent_channels=5)
    assert method.encoders[0][0].weight.shape == (5, 64, 1, 1)
    sum(losses(method, *filled(method)).values()).backward()
    for p in (*method.encoders.parameters(), *method.decoders.parameters()):
        assert (p.grad == 0).all()
    for p in (method.diffusions[0].align.weight, method.logits.align.weight, method.logits.share.weight):
        assert (p.grad != 0).any()


def test_shapes_of_other_models():
    """Maps meet at the smaller size, and a transformer's last tokens are a map."""
    method = get_method("diffkd")
    student = create_model("timm/vit_tiny_patch16_224", 10, **VIT)
    built = method(method.Config(), student, create_model("vgg8", 10), DATA)
    assert (built.student_taps, built.teacher_taps) == (("stage4",), ("last_map",))
    outputs = (
        Outputs(torch.randn(4, 10), {"stage4": torch.randn(4, 17, 48)}),
        Outputs(torch.randn(4, 10), {"last_map": torch.randn(4, 512, 4, 4)}),
    )
    batch = Batch(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    for value in built(*outputs, batch, torch.tensor(1.0)).values():
        assert torch.isfinite(value)
    pooled = build(student_taps=("pooled",), teacher_taps=("pooled",))
    s, t = (Outputs(torch.randn(4, 10), {"pooled": torch.randn(4, 64)}) for _ in range(2))
    assert torch.isfinite(sum(pooled(s, t, batch, torch.tensor(1.0)).values()))


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 501}, {"latent_channels": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        build(**settings)


def test_pairs_of_taps():
    with pytest.raises(ConfigError, match="in pairs"):
        build(student_taps=("stage1", "stage2"), teacher_taps=("stage1",))
