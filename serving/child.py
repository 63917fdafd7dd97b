"""A child process with a channel to it and a log. It ends with the process that started it (serving.inbox).

The log is a file without a name, so that nothing is left behind however this ends; /proc/PID/fd/2 shows it meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.channel import Channel

_TAIL = 2000  # bytes of the log in an error


class Child:
    """`python -m MODULE ARGUMENTS`, where "{fd}" among the arguments becomes the number of its end of the channel."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], environ: Mapping[str, str], timeout: float
    ) -> None:
        """`name` is for errors. `timeout`: seconds that a send may take."""
        self.name, self._log = name, tempfile.TemporaryFile()  # noqa: SIM115
        # Appending, the child may cut it short at any time.
        fcntl.fcntl(self._log, fcntl.F_SETFL, fcntl.fcntl(self._log, fcntl.F_GETFL) | os.O_APPEND)
        self.channel, theirs = Channel.pair(timeout)
        command = [a.replace("{fd}", str(theirs.fileno())) for a in arguments]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *command],  # -P: what lies in the working directory is not ours
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=dict(environ),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal is for the parent to handle
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def killed(self) -> bool:
        """Whether a signal ended it."""
        return (self.process.poll() or 0) < 0

    @property
    def stopped(self) -> bool:
        """Whether it stands still, by SIGSTOP or a debugger."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
        return False

    def describe(self, said: str | None = None) -> str:
        """What became of it, for an error message; `said` is what it said itself."""
        code = self.process.poll()
        if code is None:
            fate = "is stopped" if self.stopped else "is running"
        elif code < 0:
            fate = f"was ended by {_signal_name(-code)}"
        else:
            fate = f"ended with exit code {code}"
        text = f"{self.name}: process {self.process.pid} {fate}"
        if said is not None:
            text += f": {said}"
        tail = self.log_tail()
        return f"{text}\nthe end of its log:\n{tail}" if tail else f"{text}; its log is empty"

    def log_tail(self) -> str:
        """The last lines of what it wrote."""
        fd = self._log.fileno()
        size = os.fstat(fd).st_size
        return os.pread(fd, _TAIL, max(0, size - _TAIL)).decode(errors="replace").strip()


def end(children: Sequence[Child], patience: float = 2.0) -> None:
    """End them all: closed channels first, then SIGTERM, then SIGKILL, `patience` seconds between. Never raises."""
    for child in children:
        child.channel.close()
    for send_signal in (None, signal.SIGTERM, signal.SIGKILL):
        left = [child for child in children if not child.ended]
        if not left:
            return
        for child in left:
            if send_signal is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(send_signal)
        deadline = time.monotonic() + patience
        for child in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
