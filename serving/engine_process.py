"""The process of one rank's engine: `python -m serving.engine_process RANK FD`.

It holds the rank's device. All it is told comes over the channel FD, a Unix socket: it has no TCP socket but those of
JAX, because these are shut down without looking when a peer is lost. The first command is `start`: join the JAX service
(answer `joined`), load the slots it names and the programs (answer `ready`). Then `EngineLoop` takes over.

Whatever goes wrong is one `error` message, a traceback in the log, and exit code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from typing import Any

from serving.channel import Channel
from serving.inbox import Inbox
from serving.outbox import Outbox


def serve(rank: int, channel: Channel, inbox: Inbox) -> None:
    begun = time.monotonic()
    import jax
    import numpy as np

    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.config import EngineConfig
    from moe_jax.distributed import connect
    from moe_jax.engine import Engine
    from moe_jax.warmup import Spec
    from serving.engine_loop import EngineLoop
    from serving.programs_ahead import ProgramsAhead

    start = inbox.take(wait=True)[0].body
    config = EngineConfig(**start["config"])
    checkpoint = open_checkpoint(start["path"], start["load_format"])
    send = Outbox(channel).send
    spec = Spec(start["path"], start["load_format"], config, start["cache"])
    ahead = ProgramsAhead(spec, start["sizes"], start["further"], start["timeout"], send)
    send({"type": "arrived", "epoch": 0})
    client = connect(start["address"], start["node"], start["num_nodes"], int(start["timeout"]))
    device = jax.local_devices()[0]
    send({"type": "joined"})
    joined = time.monotonic()
    slots = np.array(start["slots"], np.int32)[:, None]
    programs = ahead.executables(device)
    engine = Engine(checkpoint, config, [device], slots, programs)
    engine.prime()
    loaded = time.monotonic()
    programs.note_small()
    ahead.first(jax.devices(), device)
    engine.rehearse_alone()
    seconds = {"join": joined - begun, "load": loaded - joined, "compile": time.monotonic() - loaded}
    loop = EngineLoop(engine, client, start["address"], start["rank"], send)
    about = {"device": device.device_kind, "seconds": seconds, "kernels": programs.kernels_number}
    loop.about = lambda: {**about, "sizes": ahead.ready}
    inbox.urgent = loop.urgent
    send({"type": "ready", "generation": start["generation"], **about, **loop.status()})
    threading.Thread(target=ahead.rest, name="programs", daemon=True).start()
    loop.run(inbox)


def yield_seldom() -> None:
    """On a CPU: a thread that wakes up waits until the one that runs has used its share. Engines that have more threads
    than cores send each other hundreds of small messages a step, and would otherwise interrupt each other at each,
    often while one holds the lock that the other then spins for (gloo/transport/tcp/pair.cc, handleEvents). Of three
    engines on 2 cores a step took 27 ms, and takes 16 (scripts/bench_rebalance.py, 2026-11-23, jax 0.10.2)."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        with contextlib.suppress(OSError):  # a sandbox may refuse it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # threads that are started inherit it


def main() -> None:
    faulthandler.enable()  # a crash in native code: the log says where its threads were
    yield_seldom()
    channel = Channel.inherited(int(sys.argv[2]))
    inbox = Inbox(channel)  # before anything slow is imported: from here on this process ends with its parent
    try:
        serve(int(sys.argv[1]), channel, inbox)
    except BaseException as e:
        traceback.print_exc()
        report: dict[str, Any] = {"type": "error", "kind": type(e).__name__, "message": str(e)[:4000]}
        with contextlib.suppress(Exception):
            channel.send(report)
    finally:
        sys.stderr.flush()
        os._exit(1)  # not by way of destructors, which wait for lost peers


if __name__ == "__main__":
    main()
