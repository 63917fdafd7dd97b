"""A child process with a Unix socket to it and a log. It ends with the process that started it (serving.inbox).

Without a file for it the log has no name, so that nothing is left behind however this ends; /proc/PID/fd/2 shows it
meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from serving.channel import Channel

_TAIL = 2000  # bytes of the log in an error


class Child:
    """`python -m MODULE ARGUMENTS`, where "{fd}" among the arguments becomes the number of its end of the socket.

    `channel` blocks, for those who have no event loop; `channel.fileno()` is for those who do (serving.pipe).
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        timeout: float | None = None,
        log: Path | int | None = None,
        session: bool = True,
    ) -> None:
        """`name` is for errors. `timeout`: seconds that a send on `channel` may take.

        log: a file to append to, a file descriptor to share, or None for a nameless file. session: whether it leads a
        session and a process group of its own, so that neither a Ctrl-C in the terminal nor its parent's end of the
        group reaches it.
        """
        self.name, self._log = name, _open_log(log)
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
                start_new_session=session,
            )
        self._session = session
        self._stat = os.open(f"/proc/{self.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)  # this process for ever, not its id

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def killed(self) -> bool:
        """Whether a signal ended it."""
        return (self.process.poll() or 0) < 0

    @property
    def state(self) -> str:
        """One letter of proc(5): "R" runs, "S" sleeps, "T" and "t" are stopped, "Z" has ended and "X" is gone."""
        return _state(self._stat)

    @property
    def stopped(self) -> bool:
        """Whether it stands still, by SIGSTOP or a debugger."""
        return self.state in "tT"

    def wait(self, seconds: float) -> None:
        """For its end, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL, to it and if it leads a session to whatever it started there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._session:
                os.killpg(self.pid, signal.SIGKILL)
            elif not self.ended:
                self.process.kill()

    def describe(self, said: str | None = None) -> str:
        """What became of it, for an error message; `said` is what it said itself."""
        code = self.process.poll()
        fate = fate_of(code) if code is not None else "is stopped" if self.stopped else "is running"
        text = f"{self.name}: process {self.pid} {fate}"
        if said is not None:
            text += f": {said}"
        tail = self.log_tail()
        return f"{text}\nthe end of its log:\n{tail}" if tail else f"{text}; its log is empty"

    def log_tail(self) -> str:
        """The last lines of what it wrote; nothing if that went to a terminal or a pipe."""
        fd = self._log.fileno()
        try:
            size = os.fstat(fd).st_size
            return os.pread(fd, _TAIL, max(0, size - _TAIL)).decode(errors="replace").strip()
        except OSError:
            return ""

    def close(self) -> None:
        """Let go of the socket and the log. The process is not touched, but sees the socket end."""
        self.channel.close()
        self._log.close()
        if self._stat >= 0:
            os.close(self._stat)
        self._stat = -1


class Relative:
    """A process that another one has started. To its owner it is like a Child without a log."""

    def __init__(self, name: str, pid: int) -> None:
        """Raises OSError if there is none."""
        self.name, self.pid = name, pid
        self._pidfd = os.pidfd_open(pid)
        self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def ended(self) -> bool:
        return _state(self._stat) in "XZ"

    @property
    def stopped(self) -> bool:
        return _state(self._stat) in "tT"

    def wait(self, seconds: float) -> None:
        """For its end, at most so long."""
        select.select([self._pidfd], [], [], seconds)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def describe(self, said: str | None = None) -> str:
        fate = "has ended" if self.ended else "is stopped" if self.stopped else "is running"
        return f"{self.name}: process {self.pid} {fate}" + ("" if said is None else f": {said}")

    def close(self) -> None:
        """Let go of it. The process is not touched."""
        for fd in (self._pidfd, self._stat):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._stat = -1


class Orphan(Relative):
    """One whose parent has died, found by a socket to it."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        """Raises OSError if there is none, or it is another user's."""
        self.channel = Channel(sock)
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            raise PermissionError(f"{name}: process {pid} belongs to user {uid}, expected {os.getuid()}")
        super().__init__(name, pid)

    def close(self) -> None:
        """It sees the socket end."""
        self.channel.close()
        super().close()


def _state(stat: int) -> str:
    try:
        text = os.pread(stat, 512, 0)
    except OSError:  # it has been waited for
        return "X"
    return chr(text[text.rindex(b")") + 2])


def end(children: Sequence[Child], patience: float = 2.0) -> None:
    """End them all: closed channels first, then SIGTERM, then SIGKILL, `patience` seconds between. Never raises."""
    for child in children:
        child.channel.close()
    for send_signal in (None, signal.SIGTERM, signal.SIGKILL):
        left = [child for child in children if not child.ended]
        for child in left:
            if send_signal is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(send_signal)
        deadline = time.monotonic() + patience
        for child in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))


def _open_log(log: Path | int | None) -> BinaryIO:
    """Opened for appending: then the child may cut it short at any time."""
    if isinstance(log, int):
        return os.fdopen(os.dup(log), "rb", buffering=0, closefd=True)  # type: ignore[return-value]
    if log is not None:
        return log.open("a+b", buffering=0)
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file  # type: ignore[return-value]


def fate_of(code: int) -> str:
    """In words, of a process with this exit code, which is below 0 where a signal ended it."""
    return f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
