"""Compiling what a configuration needs before it is needed.

On CPU a program for n ranks is compiled in a process with n virtual devices, so no cluster has to be up, and a cluster
that is up goes on serving. `python -m moe_jax.warmup` is that process: told on stdin what to compile, it says on stdout
what is done, a JSON object a line, and ends when its stdin does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import Bucket, EngineConfig

NICE = 5  # compiling is not in a hurry beside serving


@dataclass(frozen=True)
class Spec:
    """Which model is run how, and where its programs are kept."""

    path: str
    load_format: str
    config: EngineConfig
    cache: str

    def executables(self, kind: str = "cpu") -> Any:
        from moe_jax.checkpoint import open_checkpoint
        from moe_jax.executables import Executables
        from moe_jax.programs import ProgramStore

        checkpoint = open_checkpoint(self.path, self.load_format)  # type: ignore[arg-type]
        return Executables.of(checkpoint, self.config, kind, ProgramStore(Path(self.cache)))


def wanted(executables: Any, sizes: Iterable[int]) -> list[Any]:
    """The programs of meshes of these sizes, one rank a process."""
    return list(dict.fromkeys(p for size in sizes for p in executables.wanted(size)))


def ensure(spec: Spec, sizes: Iterable[int], timeout: float, report: Callable[[dict[str, Any]], None] = print) -> None:
    """Return when every program of these sizes is in the store; processes that want the same compile it once.

    Raises RuntimeError with the end of the compiler's log when it fails, TimeoutError after `timeout` seconds.
    """
    executables, sizes, deadline = spec.executables(), list(sizes), time.monotonic() + timeout
    programs = wanted(executables, sizes)
    while executables.missing(programs):
        with _try_lock(Path(spec.cache)) as ours:
            if ours:
                compile_all(spec, executables.missing(programs), deadline, report)
                break
        if time.monotonic() > deadline:
            raise TimeoutError(f"{spec.cache}: another process is compiling there, and has not ended")
        time.sleep(0.05)


def compile_all(spec: Spec, programs: list[Any], deadline: float, report: Callable[[dict[str, Any]], None]) -> None:
    """Compile in as many processes as there are cores."""
    if not programs:
        return
    jobs = max(1, min(len(programs), len(os.sched_getaffinity(0))))
    parts = [programs[i::jobs] for i in range(jobs)]
    compilers = [_Compiler(spec, part, report) for part in parts]
    try:
        for compiler in compilers:
            compiler.wait(deadline)
    finally:
        for compiler in compilers:
            compiler.end()


class _Compiler:
    """One process, which compiles `programs` one after another."""

    def __init__(self, spec: Spec, programs: list[Any], report: Callable[[dict[str, Any]], None]) -> None:
        environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environ.pop("JAX_NUM_CPU_DEVICES", None)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moe_jax.warmup"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            text=True,
        )
        assert self._process.stdin is not None
        order = {
            "spec": asdict(spec),
            "programs": [{"kind": p.kind, "bucket": asdict(p.bucket), "ranks": p.ranks} for p in programs],
        }
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        self._left, self._report, self._log = len(programs), report, ""
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._read, self._read_log)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._report(json.loads(line))
            self._left -= 1

    def _read_log(self) -> None:
        for line in self._process.stderr or ():
            self._log = (self._log + line)[-2000:]

    def wait(self, deadline: float) -> None:
        self._threads[0].join(max(0.0, deadline - time.monotonic()))
        if self._threads[0].is_alive():
            raise TimeoutError(f"compiling: {self._left} programs are not done in time")
        if self._left:
            self._threads[1].join(1.0)
            raise RuntimeError(f"compiling: {self._left} programs are not done; the end of the log:\n{self._log}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def _try_lock(directory: Path) -> Iterator[bool]:
    """Whether it is ours until the end of the block."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".compiling").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main() -> None:
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.nice(NICE)
    from moe_jax.distributed import set_cpu_devices
    from moe_jax.executables import Program

    spec = Spec(**(order["spec"] | {"config": EngineConfig(**order["spec"]["config"])}))
    programs = [Program(p["kind"], Bucket(**p["bucket"]), p["ranks"]) for p in order["programs"]]
    set_cpu_devices(max(p.ranks for p in programs))
    import jax

    executables = spec.executables()
    for program in programs:
        begun = time.monotonic()
        raw = executables.compile(program, jax.devices()[: program.ranks])
        entry = {"step": program.kind, "bucket": asdict(program.bucket), "mesh": program.ranks, "bytes": len(raw)}
        print(json.dumps(entry | {"seconds": round(time.monotonic() - begun, 3), "cached": False}), flush=True)


def _end_with_stdin() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
