"""The C library's heap. By itself it gives back only what lies at the ends of its arenas."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Give the pages back to the kernel that lie free between blocks in use; nothing where the C library is not glibc.

    Takes milliseconds for 100 MiB, during which other threads that allocate may wait; Python ones go on.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
