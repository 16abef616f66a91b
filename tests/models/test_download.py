"""Pretrained weights without a network: a clear error, and a limit of the wait."""

import socket
import time

import pytest
import torchvision

from mdistiller import create_model
from mdistiller.errors import CheckpointError

pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")


def test_timm_without_a_network(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's requests
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"timm/resnet18.*--student.checkpoint FILE"):
        create_model("timm/resnet18", 5, pretrained=True)


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
