"""Processes of their own for tests, forked by a server that has imported torch once for all of them.

A fresh interpreter takes seconds to import torch; a fork takes none. `cli/test_train_command.py` and
`training/test_signals.py` have the commands in fresh ones.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore

_SERVER = multiprocessing.get_context("forkserver")
# All that a run imports, some of it in its first step.
_SERVER.set_forkserver_preload(
    [
        "mdistiller.cli.train",
        "mdistiller.report",
        "mdistiller.tasks.classification",
        "sklearn.datasets",
        "torch._dynamo",
        "torch.distributed.run",
        "torch.fx.experimental.symbolic_shapes",
        "torchvision",
    ]
)


class Forked:
    """A function's call in a process of its own, with the methods of `subprocess.Popen` that tests call.

    Args:
        function: a function of a module.
        args: its arguments.
        env: further environment variables.
        cwd: working directory.
        own_group: whether the process leads a process group.
        file_limit: size in bytes past which writes to files fail, as on a full disk.
    """

    def __init__(self, function, *args, env=(), cwd=None, own_group=False, file_limit=None):
        self._folder = Path(tempfile.mkdtemp())
        options = (dict(env), cwd or os.getcwd(), own_group, file_limit)
        self._process = _SERVER.Process(target=_call, args=(self._folder, options, function, args))
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            forkserver.ensure_running()  # the server of all starts with the first
        self._process.start()
        self.pid = self._process.pid
        atexit.register(self._process.kill)  # not waited for where a test has failed

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=120):
        """Waits for the end; returns what was written to stdout and stderr."""
        self._process.join(timeout)
        written = [(self._folder / name).read_text() for name in ("out", "err")]
        if self.poll() is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("mdistiller", timeout, *written)
        atexit.unregister(self._process.kill)
        shutil.rmtree(self._folder)
        return written


def mdistiller(*argv):
    """Runs the command in this process, and ends it."""
    from mdistiller.cli.main import main

    sys.argv = ["mdistiller", *map(str, argv)]
    main()


def script(file, *argv):
    """Runs a Python file in this process, as `python FILE ARGV` does."""
    sys.argv = [str(file), *map(str, argv)]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(str(file), run_name="__main__")


def run_group(function, *args, env=(), cwd=None):
    """Calls a function in two processes that form a group, as those of torchrun do.

    Returns exit codes, what each process wrote to stdout, and what each wrote to stderr.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    group |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", **dict(env)}
    return _finish([Forked(function, *args, env=group | {"RANK": r, "LOCAL_RANK": r}, cwd=cwd) for r in "01"])


def run_ranks(work, *args):
    """Calls `work(rank, *args)` in two processes, for ranks 0 and 1; both have to end well."""
    codes, _, errors = _finish([Forked(work, rank, *args) for rank in range(2)])
    assert codes == [0, 0], errors


def _finish(processes):
    written = [process.communicate() for process in processes]
    return [process.returncode for process in processes], *map(list, zip(*written, strict=True))


def torchrun(flags, *argv):
    """Starts `torchrun FLAGS -m mdistiller ARGV`, whose two workers are fresh interpreters."""
    return Forked(_torchrun, *flags, "-m", "--", "mdistiller", *map(str, argv))


def _call(folder, options, function, args):
    env, cwd, own_group, file_limit = options
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in enumerate(("out", "err"), start=1):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # a fork inherits the server's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if own_group:
        os.setsid()
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    function(*args)


def _torchrun(*argv):
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", "2", *argv])
