"""C++ that XLA calls through its foreign function interface, compiled where it runs.

A library is compiled when first used, by the C++ compiler of the machine, and kept in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib.version

_FLAGS = ("-std=c++17", "-fPIC", "-shared", "-DNDEBUG")


def _compiler() -> list[str] | None:
    """The command of the C++ compiler, $CXX or c++; None if there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if command and shutil.which(command[0]) else None


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return f"{platform.machine()} {found[0]}"
    return f"{platform.machine()} {platform.processor()}"


@dataclass(frozen=True)
class Library:
    """sources: the file that is compiled, and those that it includes. targets: what programs call, the handler in the
    library (both moe_jax_…), and on which of XLA's platforms. without: what those who cannot have it are warned of."""

    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    targets: tuple[tuple[str, str, str], ...]
    without: str

    @functools.cache  # noqa: B019 (there are two)
    def identity(self) -> str:
        """Digest of all that results may depend on: the source, the compiler, the processor, XLA's headers.

        Raises OSError or subprocess.SubprocessError when there is no working compiler.
        """
        command = _compiler()
        if command is None:
            name = os.environ.get("CXX") or "c++"
            raise FileNotFoundError(f"no C++ compiler: {name} is not there; install one, or set CXX")
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
        digest = hashlib.sha256()
        for file in self.sources:
            digest.update(file.read_bytes())
        flags = _FLAGS + self.flags
        digest.update(repr((command, version, flags, _processor(), jaxlib.version.__version__)).encode())
        return digest.hexdigest()[:24]

    @functools.cache  # noqa: B019
    def load(self) -> ctypes.CDLL | None:
        """The library, registered with XLA; None, after a warning, where it cannot be had."""
        try:
            library = ctypes.CDLL(str(self._build()))
        except (OSError, subprocess.SubprocessError) as e:
            said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
            warnings.warn(f"{self.without}: {said[0] if said else e!r}", stacklevel=2)
            return None
        for target, handler, where in self.targets:
            capsule = jax.ffi.pycapsule(getattr(library, f"moe_jax_{handler}"))
            jax.ffi.register_ffi_target(f"moe_jax_{target}", capsule, platform=where)
        return library

    def _build(self) -> Path:
        """The library's path; compiled by one process at a time if it is not there."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-jax" / "native"
        path = home / f"{self.identity()}.so"
        if path.exists():
            return path
        command = _compiler()
        assert command is not None
        home.mkdir(parents=True, exist_ok=True)
        with (home / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=home) as directory:
                    new = Path(directory) / path.name
                    files = ("-isystem", jax.ffi.include_dir(), str(self.sources[0]), "-o", str(new))
                    command += [*_FLAGS, *self.flags, *files]
                    subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
                    os.replace(new, path)
        return path
