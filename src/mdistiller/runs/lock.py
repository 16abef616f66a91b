"""Lock of a run folder."""

import os
import platform
import time
from pathlib import Path
from typing import ClassVar, TextIO

from mdistiller.errors import ConfigError

LOCK = ".lock"


class FolderLock:
    """Hold of one process on a folder. The lock of a process that has died is void.

    Raises:
        ConfigError: another process holds the folder.
    """

    patience: ClassVar[float] = 0.0
    """Seconds to wait for a folder that another process holds."""

    def __init__(self, folder: Path) -> None:
        self.path, end = folder / LOCK, time.monotonic() + self.patience
        # Opened again for each attempt, as the other process removes its file; open as long as it is held.
        while not _try_lock(file := open(self.path, "a+")):  # noqa: SIM115
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if time.monotonic() >= end:
                raise ConfigError(f"out: {folder} is in use by {owner}")
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._file: TextIO | None = file

    def release(self) -> None:
        """Releases the folder; more calls do nothing."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _try_lock(file: TextIO) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: the folder is not protected
        return True
    try:  # unlike flock's, the lock does not pass on to the loader's processes
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
