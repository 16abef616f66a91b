"""Pretrained weights without a network: no repeated requests, and a message that names the file."""

import socket
import time
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mdistiller import create_model
from mdistiller.errors import CheckpointError
from mdistiller.models import download

timm = pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def no_network(monkeypatch):
    """Lets no name be resolved; returns the sleeps between requests."""
    sleeps = []

    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(time, "sleep", sleeps.append)
    return sleeps


def test_timm_without_a_network(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match="timm/resnet18") as caught:
        create_model("timm/resnet18", 5, pretrained=True)
    message = str(caught.value)
    assert "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors" in message
    assert "--student.checkpoint FILE" in message
    assert (
        f"save it as {Path(torch.hub.get_dir()) / 'checkpoints' / 'resnet18.a1_in1k.safetensors'}" in message
    )
    # Older ones repeat each request by themselves.
    assert no_network == [] or int(hub.__version__.partition(".")[0]) < 1


def test_weights_in_the_folder_that_the_message_names(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    model = timm.create_model("resnet18")
    (tmp_path / "checkpoints").mkdir()
    save_file(model.state_dict(), tmp_path / "checkpoints" / "resnet18.a1_in1k.safetensors")
    found = create_model("timm/resnet18", pretrained=True)
    assert all(value.equal(found.state_dict()[key]) for key, value in model.state_dict().items())
    assert create_model("timm/resnet18", 5, pretrained=True).fc.out_features == 5


def test_weights_in_the_cache_need_no_request(no_network, monkeypatch):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: "file")
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("a request"))
    download.find_hub_weights("resnet18", {"pretrained": True})


@pytest.mark.parametrize(
    "options", [{"pretrained_cfg_overlay": {"file": "w.pth"}}, {"pretrained_cfg": "tv_in1k"}]
)
def test_other_weights_are_left_to_timm(no_network, options):
    given = {"pretrained": True, **options}
    assert download.find_hub_weights("resnet18", given) == given


@pytest.mark.parametrize("own", [None, 3.0])
def test_torch_hub_waits_ten_seconds_at_most(monkeypatch, own):
    seen = []
    state = torchvision.models.resnet18().state_dict()

    def fetch(*_, **__):
        seen.append(socket.getdefaulttimeout())
        return state

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetch)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(own)
    try:
        create_model("torchvision/resnet18", 5, pretrained=True)
        assert (seen, socket.getdefaulttimeout()) == ([own or 10.0], own)
    finally:
        socket.setdefaulttimeout(before)
