"""Compiling what a configuration needs before it is needed.

A program for n ranks is compiled in a process that has n devices of its kind, so no cluster has to be up, and a cluster
that is up goes on serving. On CPU these are n virtual devices; on GPU one real one and n - 1 that JAX pretends, for
nothing is run. `python -m moe_jax.warmup` is that process: told on stdin what to compile, it says on stdout what is
done, a JSON object a line, and ends when its stdin does.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.config import Bucket, EngineConfig

if TYPE_CHECKING:
    import numpy as np

    from moe_jax.checkpoint import Checkpoint
    from moe_jax.executables import Executables, Program
    from moe_jax.params import Param
    from moe_jax.programs import State

Report = Callable[[dict[str, Any]], None]

NICE = 5  # compiling is not in a hurry beside serving
_MEMORY = 2 << 30  # bytes that a compiling process may take: as seen, and half as much again
_GPU_JOBS = 8  # processes that share one GPU while they compile
_SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # so none of them takes all of its memory at once


@dataclass(frozen=True)
class Spec:
    """Which model is run how, and where its programs are kept."""

    path: str
    load_format: str
    config: EngineConfig
    cache: str

    def executables(self, kind: str = "cpu") -> Executables:
        from moe_jax.checkpoint import open_checkpoint
        from moe_jax.executables import Executables
        from moe_jax.programs import ProgramStore

        checkpoint = open_checkpoint(self.path, self.load_format)  # type: ignore[arg-type]
        return Executables.of(checkpoint, self.config, kind, ProgramStore(Path(self.cache)))


@dataclass(frozen=True)
class Entry:
    """A program that is wanted, and what is on disk of it. None: the small ones that loading parameters takes."""

    program: Program | None
    keys: tuple[str, ...]
    state: State
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return describe(self.program) | {"bytes": self.bytes}


def describe(program: Program | None) -> dict[str, Any]:
    if program is None:
        return {"step": "load", "bucket": None, "mesh": 1}
    return {"step": program.kind, "bucket": asdict(program.bucket), "mesh": program.ranks}


def wanted(executables: Executables, sizes: Iterable[int]) -> list[Program]:
    """The programs of meshes of these sizes, one rank a process."""
    return list(dict.fromkeys(p for size in sizes for p in executables.wanted(size)))


def look(executables: Executables, sizes: Iterable[int]) -> list[Entry]:
    """What is on disk of the programs of these sizes, each read and compared with its checksum. Compiles nothing."""
    store, keys = executables.store, {program: executables.key(program) for program in wanted(executables, sizes)}
    entries = [Entry(program, (key,), *store.look(key)) for program, key in keys.items()]
    small = store.needs(executables.loading)
    seen = [store.look(key) for key in small or ()]
    states = {state for state, _ in seen} if small else {"missing"}
    state: State = "damaged" if "damaged" in states else "missing" if "missing" in states else "present"
    return [*entries, Entry(None, tuple(small or ()), state, sum(size for _, size in seen))]


def ensure(spec: Spec, sizes: Iterable[int], timeout: float, report: Report = print) -> None:
    """Return when every program of these sizes is in the store; processes that want the same compile it once. On CPU.

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


def compile_all(
    spec: Spec,
    programs: Sequence[Program | None],
    deadline: float,
    report: Report,
    environ: Mapping[str, str] | None = None,
    jobs: int | None = None,
) -> None:
    """Compile in `jobs` processes, by default as many as there are cores and memory for. Raises as `ensure`.

    environ: theirs; its JAX_PLATFORMS says for what is compiled, without it that is the CPU.
    """
    if not programs:
        return
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"} if environ is None else environ
    jobs = min(len(programs), jobs or parallel(environ["JAX_PLATFORMS"]))
    parts = [programs[i::jobs] for i in range(jobs)]
    compilers = [_Compiler(spec, part, report, environ) for part in parts]
    try:
        for compiler in compilers:
            compiler.wait(deadline)
    finally:
        for compiler in compilers:
            compiler.end()


def parallel(platform: str) -> int:
    """How many processes may compile at a time: no more than there are cores, nor than fit the memory that is free."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        cores = min(cores, int(lines["MemAvailable"].split()[0]) * 1024 // _MEMORY)
    return max(1, cores if platform == "cpu" else min(cores, _GPU_JOBS))


def device_kind(environ: Mapping[str, str]) -> str:
    """Of the first device that a process with this environment finds, as programs are kept by. Raises RuntimeError."""
    code = "import jax; d = jax.devices()[0]; print(d.platform if d.platform == 'cpu' else d.device_kind)"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=dict(environ), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no device of JAX_PLATFORMS={environ['JAX_PLATFORMS']}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip().splitlines()[-1]


class _Compiler:
    """One process, which compiles `programs` one after another."""

    def __init__(
        self, spec: Spec, programs: Sequence[Program | None], report: Report, environ: Mapping[str, str]
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moe_jax.warmup"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={n: v for n, v in environ.items() if n != "JAX_NUM_CPU_DEVICES"} | _SHARING,
            text=True,
        )
        assert self._process.stdin is not None
        order = {
            "spec": asdict(spec),
            "programs": [describe(program) for program in programs],
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
    from moe_jax.distributed import pretend_gpus, set_cpu_devices
    from moe_jax.executables import Program

    spec = Spec(**(order["spec"] | {"config": EngineConfig(**order["spec"]["config"])}))
    programs = [
        None if p["step"] == "load" else Program(p["step"], Bucket(**p["bucket"]), p["mesh"]) for p in order["programs"]
    ]
    most = max(1 if p is None else p.ranks for p in programs)
    on_cpu = os.environ["JAX_PLATFORMS"] == "cpu"
    (set_cpu_devices if on_cpu else pretend_gpus)(most)
    import jax

    devices = sorted(jax.devices(), key=lambda d: d.process_index != jax.process_index())  # a real one first
    executables = spec.executables("cpu" if on_cpu else devices[0].device_kind)
    for program in programs:
        begun = time.monotonic()
        if program is None:
            size = _load_nothing(spec, executables, devices[0])
        else:
            size = len(executables.compile(program, sorted(devices[: program.ranks], key=lambda d: d.id)))
        seconds = round(time.monotonic() - begun, 3)
        print(json.dumps(describe(program) | {"bytes": size, "seconds": seconds, "cached": False}), flush=True)


def _load_nothing(spec: Spec, executables: Executables, device: Any) -> int:
    """Load a rank's parameters, all zeros, so that every small program which that takes is compiled; their bytes."""
    import numpy as np

    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.dummy_checkpoint import DummyCheckpoint
    from moe_jax.engine import Engine

    checkpoint = open_checkpoint(spec.path, spec.load_format)  # type: ignore[arg-type]
    model = checkpoint.config
    slots = np.zeros((model.num_moe_layers, 1, spec.config.slots_for(model.num_experts)), np.int32)
    empty = checkpoint if isinstance(checkpoint, DummyCheckpoint) else _Zeros(checkpoint)
    Engine(empty, spec.config, [device], slots, executables).prime()
    executables.note_small()
    return sum(executables.store.look(key)[1] for key in executables.store.needs(executables.loading) or ())


class _Zeros:
    """A checkpoint of the same shapes and types as another, of which nothing is read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.dtype = checkpoint.config, checkpoint.dtype

    def read(self, path: tuple[Any, ...], param: Param, layer: int, expert: int | None) -> np.ndarray:
        import numpy as np

        return np.zeros(param.shape, self.dtype(path, param, layer))


def _end_with_stdin() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
