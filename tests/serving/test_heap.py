"""Free memory between blocks in use goes back to the kernel."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from serving import heap

BLOCKS, SIZE, KEPT = 100_000, 1000, 1000  # every so manyth is kept


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(SIZE) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for i, block in enumerate(blocks):
        if (i + 1) % KEPT:
            libc.free(block)
    before = resident()
    heap.trim()
    print((before - resident()) / (BLOCKS * SIZE))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_trim() -> None:
    """In a process of its own, where nobody else allocates."""
    done = subprocess.run([sys.executable, "-m", "tests.serving.test_heap"], check=True, capture_output=True, text=True)
    assert float(done.stdout) > 0.9


if __name__ == "__main__":
    main()
