"""An engine's programs, made ready before they are needed: first those of the mesh it starts in, then, while it serves,
those of the meshes that losses would leave.

On CPU missing ones are compiled by other processes (moe_jax.warmup), one for the whole machine. Elsewhere each engine
compiles in place.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.warmup import Spec, ensure, wanted

if TYPE_CHECKING:
    import jax

    from moe_jax.executables import Executables


MEMORY = 1 << 30  # bytes of programs that are held for meshes beyond the first, as they lie on disk


class ProgramsAhead:
    """sizes: of meshes, the most urgent first; `further` ones only if others have compiled them (moe-jax warmup).

    `send` reports `programs` messages.
    """

    def __init__(
        self, spec: Spec, sizes: Sequence[int], further: Sequence[int], timeout: float, send: Callable[..., None]
    ) -> None:
        from moe_jax.distributed import default_platform

        self._spec, self._sizes, self._further = spec, list(sizes), list(further)
        self._timeout, self._send = timeout, send
        self.ready: list[int] = []  # sizes of which all programs are at hand
        self._on_cpu = default_platform() == "cpu"
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._ensure_first, name="compiling", daemon=True)
        if self._ahead:
            self._thread.start()

    @property
    def _ahead(self) -> bool:
        return self._on_cpu and self._spec.cache is not None

    def executables(self, device: jax.Device) -> Executables:
        from moe_jax.checkpoint import open_checkpoint
        from moe_jax.executables import Executables
        from moe_jax.programs import ProgramStore

        spec = self._spec
        checkpoint = open_checkpoint(spec.path, spec.load_format)  # type: ignore[arg-type]
        kind = "cpu" if self._on_cpu else device.device_kind
        store = ProgramStore(None if spec.cache is None else Path(spec.cache))
        self._executables = Executables.of(checkpoint, spec.config, kind, store)
        return self._executables

    def first(self, devices: Sequence[jax.Device], own: jax.Device) -> None:
        """Return when the first size's programs are in memory. Raises what kept them from it."""
        if self._ahead:
            self._thread.join()
            if self._error is not None:
                raise self._error
        self._devices, self._own = devices, own
        self._take(self._sizes[0])

    def rest(self) -> None:
        """The other sizes, one by one, as far as memory is meant for them. What fails is said in the log, and compiled
        when it is needed."""
        self._say_ready(self._sizes[:1])
        for size in [*self._sizes[1:], *self._further]:
            store, programs = self._executables.store, wanted(self._executables, [size])
            if store.held > MEMORY:
                left = f"programs for meshes of {size} ranks and others are left on disk: {store.held} bytes are held"
                return print(left, file=sys.stderr)
            if size in self._further and self._executables.missing(programs):
                continue
            try:
                if self._ahead:
                    ensure(self._spec, [size], self._timeout, lambda _: None)
                self._take(size)
            except Exception:
                traceback.print_exc()
                return
            self._say_ready([*self.ready, size])

    def _say_ready(self, sizes: list[int]) -> None:
        self.ready = sizes
        self._send({"type": "programs", "sizes": self.ready})

    def _ensure_first(self) -> None:
        try:
            ensure(self._spec, self._sizes[:1], self._timeout, lambda _: None)
        except BaseException as e:
            self._error = e

    def _take(self, size: int) -> None:
        """Into memory; compiled in place where nobody else has. The engines of a machine share the work: each begins
        elsewhere, and what another one is making is waited for."""
        programs, executables = wanted(self._executables, [size]), self._executables
        begin = len(programs) * self._own.process_index // max(1, len(self._devices))
        for program in programs[begin:] + programs[:begin]:
            key = executables.key(program)
            if executables.store.get(key) is None:
                with executables.store.making(key):
                    if executables.store.get(key) is None:
                        others = [d for d in self._devices if d != self._own]
                        executables.compile(program, [self._own, *others[: program.ranks - 1]])
