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
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jax
import jaxlib.version

from moe_jax.distributed import program_flags

# The modules of this package whose source decides what is compiled.
_SOURCES = (
    *("attention", "batch_input", "config", "executables", "kernels/expert_ffn", "kernels/native", "mesh", "model"),
    *("moe", "params", "reduce", "sampling", "tiles"),
)


@cache
def source_digest() -> str:
    root, digest = Path(__file__).parent, hashlib.sha256()
    for name in _SOURCES:
        digest.update((root / f"{name}.py").read_bytes())
    return digest.hexdigest()


def key(kind: str, *parts: object) -> str:
    """The name of an entry for a kind of device. `parts` must have a repr that says all there is."""
    fixed = (jax.__version__, jaxlib.version.__version__, kind, program_flags(kind), source_digest())
    return hashlib.sha256(repr((fixed, parts)).encode()).hexdigest()[:40]


@dataclass
class ProgramStore:
    """Serialised programs by key, in memory and, with a directory, on disk. Any process may write at any time."""

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
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                warnings.warn(f"{path}: damaged, found {len(data)} bytes with another checksum; removed", stacklevel=2)
                path.unlink(missing_ok=True)
                return None
            self._memory[key] = data[32:]
        return self._memory.get(key)

    def has(self, key: str) -> bool:
        path = self.path(key)
        return key in self._memory or (path is not None and path.exists())

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
        path = self.path(key)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
                file.write(hashlib.sha256(program).digest() + program)
            os.replace(file.name, path)
        except OSError as e:
            warnings.warn(f"{path}: a compiled program cannot be kept there ({e.strerror})", stacklevel=2)
