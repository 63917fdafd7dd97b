"""What the membership has its driver do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from serving.epoch import Epoch

State = Literal["STARTING", "SERVING", "RECOVERING", "UNSERVABLE", "DRAINING"]


class Action:
    """What the driver has to do."""


@dataclass(frozen=True)
class StartService(Action):
    """Start the service of a new generation, a process of its own, beside that of the one before."""

    generation: int
    nodes: tuple[int, ...]  # ranks; a rank's node id is its index


@dataclass(frozen=True)
class StopService(Action):
    """End that service's process, stopped or not. It comes once the engines that would die with it are replaced."""

    generation: int


@dataclass(frozen=True, eq=False)
class StartEngine(Action):
    """Replace the worker's engine, if it has one, by a new one; what that one says carries this incarnation."""

    rank: int
    incarnation: int
    generation: int
    node: int
    slots: np.ndarray  # int32 [layers, S]


@dataclass(frozen=True)
class Fence(Action):
    """Shut this node out of the service until `fenced`; its next engine is started only after that."""

    rank: int
    incarnation: int
    generation: int
    node: int


@dataclass(frozen=True)
class Forget(Action):
    """Node 0 is about to start again. Must be done before the StartEngine that follows."""

    generation: int


@dataclass(frozen=True)
class Abort(Action):
    """To these ranks: collectives of epochs <= `epoch` are over, and these are left. Repeated when fewer are."""

    ranks: tuple[int, ...]
    incarnations: tuple[int, ...]
    epoch: int


@dataclass(frozen=True, eq=False)
class Persist(Action):
    """May be repeated; the content of a number never changes."""

    epoch: Epoch


@dataclass(frozen=True, eq=False)
class Announce(Action):
    epoch: Epoch
    shrink: bool  # enter now: nobody is stepping, they were told to abort. Otherwise at an agreed step
    leavers: tuple[int, ...] = ()  # present ranks outside the epoch; told too, for they leave at that step


@dataclass(frozen=True, eq=False)
class Serve(Action):
    """All members have entered."""

    epoch: Epoch


@dataclass(frozen=True)
class Dismiss(Action):
    """This worker has to exit. For the stream with this incarnation only."""

    rank: int
    incarnation: int
    reason: str


@dataclass(frozen=True, eq=False)
class Prefetch(Action):
    rank: int
    incarnation: int
    slots: np.ndarray  # int32 [layers, S]


@dataclass(frozen=True)
class StateChange(Action):
    name: State
    reason: str
