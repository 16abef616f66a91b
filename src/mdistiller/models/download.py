"""Downloads of pretrained weights that fail soon without a network."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mdistiller.errors import CheckpointError
from mdistiller.types import Line

SECONDS = 10.0  # longest wait for a host
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the names that timm tries, in this order


@contextmanager
def limited_wait() -> Iterator[None]:
    """Context in which torch.hub waits 10 seconds for a silent host, not as long as the system does."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def find_hub_weights(name: str, options: Line) -> Line:
    """Returns the options with which timm finds the pretrained weights of a model.

    They are on this machine, in the cache of the hub or in torch.hub's folder of checkpoints, or their host
    answers. Without a network, huggingface_hub repeats each of timm's two requests for 23 seconds. An answer
    of any kind passes here: timm words what is wrong with the rest.

    Args:
        name: the model's name in timm.
        options: options of the model, which ask for pretrained weights.

    Raises:
        CheckpointError: no answer; the message names the file, and the folder in which to save it.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    # Options may name other weights, such as a file.
    if config is None or config.file or {"pretrained_cfg", "pretrained_cfg_overlay"} & options.keys():
        return options
    if not config.hf_hub_id:
        return options
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
    version = revision or None
    saved = Path(torch.hub.get_dir()) / "checkpoints" / f"{Path(repository).name}{Path(names[0]).suffix}"
    if saved.is_file():
        return {**options, "pretrained_cfg_overlay": {"file": str(saved)}}
    if any(isinstance(hub.try_to_load_from_cache(repository, n, revision=version), str) for n in names):
        return options
    url = hub.hf_hub_url(repository, names[0], revision=version)
    try:
        hub.get_hf_file_metadata(url, timeout=SECONDS)
    except HfHubHTTPError:
        return options
    except Exception as error:  # the errors of the HTTP client, which differs between versions
        raise CheckpointError(
            f"pretrained weights of 'timm/{name}' cannot be downloaded: {url} cannot be reached ({error}). "
            f"Download that file elsewhere and save it as {saved}, or give it: --student.checkpoint FILE, "
            "--teacher.checkpoint FILE"
        ) from error
    return options
