"""Limit of the wait for pretrained weights."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS = 10.0  # longest wait for a silent host


@contextmanager
def limited_wait() -> Iterator[None]:
    """Context in which torch.hub waits 10 seconds for a silent host, not as long as the system does."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
