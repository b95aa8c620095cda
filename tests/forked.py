"""Processes that start in milliseconds and may be killed: forks of one that has imported everything."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver
from unittest.mock import patch

KNOWN = ["convmixer_edu.train", "convmixer_edu.data", "sklearn.datasets", "pytest"]


def context():
    """Return multiprocessing by forks of a server, which computes with one thread and has the digits at hand."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(KNOWN)
    with patch.dict(os.environ, OMP_NUM_THREADS="1", CONVMIXER_DATA="digits"):
        forkserver.ensure_running()
    return fork


class Process:
    """A fork at work, and what it tells: `work(tell, *args)` runs there, `tell(x)` arrives here."""

    def __init__(self, work, *args):
        self.told, theirs = context().Pipe(duplex=False)
        self.process = context().Process(target=_run, args=(work, theirs, args), daemon=True)
        self.process.start()
        theirs.close()

    def __iter__(self):
        while True:
            try:
                yield self.told.recv()
            except (EOFError, ConnectionResetError):
                return

    def pause(self):
        """Hold it where it is, until it is ended by SIGKILL."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def end(self, number=None):
        """Send a signal if one is given and it still runs, wait for the end; return what was told since, and the exit code."""
        if number is not None and self.process.is_alive():
            os.kill(self.process.pid, number)
        rest = list(self)
        self.process.join(3600)  # a guard, no promise
        return rest, self.process.exitcode


def _run(work, theirs, args):
    work(theirs.send, *args)
