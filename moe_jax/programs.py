"""Compiled programs, kept by what they compute.

An entry's key is made of everything that decides what a program does: the model's and the engine's configuration, the
bucket, the number of ranks, the kind of device, the versions and flags of JAX, and this package's own source. Nothing
in it says which ranks form the mesh, where they listen, or who compiled it, so an entry serves every mesh of its size,
in every order, on every machine of that kind. A key is known without tracing anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import jax
import jaxlib.version

from moe_jax.distributed import program_flags

# The modules of this package whose source decides what is compiled.
_SOURCES = (
    *("attention", "batch_input", "config", "dummy_checkpoint", "executables", "hopper", "kernels/expert_ffn"),
    *("kernels/native", "mesh", "model", "moe", "params", "reduce", "sampling", "small", "tiles"),
    *(f"kernels/{name}" for name in ("decode", "grouped_gemm", "hopper_ffn", "paged_attention", "routing", "sampling")),
    "kernels/tuning",
)


@cache
def source_digest() -> str:
    root, digest = Path(__file__).parent, hashlib.sha256()
    for name in _SOURCES:
        digest.update((root / f"{name}.py").read_bytes())
    digest.update((root / "kernels" / "tuned.json").read_bytes())
    return digest.hexdigest()


def key(kind: str, *parts: object) -> str:
    """The name of an entry for a kind of device. `parts` must have a repr that says all there is."""
    fixed = (jax.__version__, jaxlib.version.__version__, kind, program_flags(kind), source_digest())
    return hashlib.sha256(repr((fixed, parts)).encode()).hexdigest()[:40]


State = Literal["present", "missing", "damaged"]
_LEFT_OVER = 3600.0  # seconds after which a file that was never finished is nobody's any more


@dataclass
class ProgramStore:
    """Serialised programs by key, in memory and, with a directory, on disk. Any process may write at any time.

    Beside the programs lie lists of what configurations need (`need`), so that the rest can be told (`prune`).
    """

    directory: Path | None
    _memory: dict[str, bytes] = field(default_factory=dict, repr=False)

    def path(self, key: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{key}.program"

    def get(self, key: str) -> bytes | None:
        """None if there is none. A damaged file is one that is not there: it is removed, and will be made anew."""
        path = self.path(key)
        if key not in self._memory and path is not None:
            try:
                data = path.read_bytes()
            except OSError:
                return None
            if not _whole(data):
                warnings.warn(f"{path}: damaged, found {len(data)} bytes with another checksum; removed", stacklevel=2)
                path.unlink(missing_ok=True)
                return None
            self._memory[key] = data[_CHECKSUM:]
        return self._memory.get(key)

    def look(self, key: str) -> tuple[State, int]:
        """What is on disk, read and compared with its checksum, and the program's bytes. Nothing is kept or removed."""
        path = self.path(key)
        try:
            data = b"" if path is None else path.read_bytes()
        except OSError:
            return "missing", 0
        return ("present" if _whole(data) else "damaged" if path else "missing"), max(len(data) - _CHECKSUM, 0)

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return sum(map(len, self._memory.values()))

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Held while an entry is made, so that processes which want the same do not all make it. Look again inside."""
        with contextlib.ExitStack() as stack:
            path = self.path(key)
            with contextlib.suppress(OSError):  # a directory that cannot be written: everybody makes their own
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context((path.parent / f".{key}.making").open("w"))
                    stack.callback(Path(file.name).unlink, missing_ok=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def put(self, key: str, program: bytes) -> None:
        """A directory that cannot be written is a warning: the program is at hand all the same."""
        self._memory[key] = program
        if (path := self.path(key)) is not None:
            try:
                _write(path, hashlib.sha256(program).digest() + program)
            except OSError as e:
                warnings.warn(f"{path}: a compiled program cannot be kept there ({e.strerror})", stacklevel=2)

    def need(self, configuration: str, keys: Iterable[str]) -> None:
        """Note what a configuration needs, in the place of what it needed before. Raises OSError."""
        _write(self._list(configuration), json.dumps(sorted(keys)).encode())

    def needs(self, configuration: str) -> list[str] | None:
        """The keys that were noted; None if none were."""
        try:
            return json.loads(self._list(configuration).read_text())
        except (OSError, ValueError):
            return None

    def _list(self, configuration: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{hashlib.sha256(configuration.encode()).hexdigest()[:40]}.needed"

    def prune(self) -> list[tuple[str, int]]:
        """Remove the programs that no noted configuration needs; their keys and bytes. Raises OSError."""
        assert self.directory is not None
        needed = {key for path in self.directory.glob("*.needed") for key in json.loads(path.read_text())}
        unfinished = [p for p in self.directory.glob(".new-*") if time.time() - p.stat().st_mtime > _LEFT_OVER]
        removed = [p for p in sorted(self.directory.glob("*.program")) if p.stem not in needed] + unfinished
        sizes = [(path.stem, path.stat().st_size) for path in removed]
        for path in removed:
            path.unlink(missing_ok=True)
            self._memory.pop(path.stem, None)
        return sizes


_CHECKSUM = 32  # bytes of SHA-256 in front of each program


def _whole(data: bytes) -> bool:
    return hashlib.sha256(data[_CHECKSUM:]).digest() == data[:_CHECKSUM]


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whoever else writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
