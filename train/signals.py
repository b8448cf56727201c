"""Signals: SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and an end; a worker never outlives its torchrun."""

import ctypes
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A terminal sends SIGINT to torchrun and its workers at once, and torchrun passes it on besides."""
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop. Only the flag is set in the handler; the loop acts on it."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.requested = True


def die_with_parent() -> None:
    """Under torchrun, ask the kernel to kill this process when its parent ends (Linux; elsewhere torchrun's own care).

    A trainer that a person starts without torchrun may outlive the shell, as under nohup.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
