"""The process of one rank's engine: `python -m serving.engine_process RANK FD`.

It holds the rank's device. All it is told comes over the channel FD, a Unix socket: it has no TCP socket but those of
JAX, because these are shut down without looking when a peer is lost. Two commands start it, and each is answered before
the next is sent: `start` (join the JAX service; answer `joined`) and `epoch` (these ranks form the mesh, with these
experts; answer `ready`, when everything is loaded and compiled). Then `EngineLoop` takes over.

Whatever goes wrong is one `error` message, a traceback in the log, and exit code 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback

from serving.channel import Channel
from serving.inbox import Inbox
from serving.outbox import Outbox


def serve(rank: int, channel: Channel, inbox: Inbox) -> None:
    begun = time.monotonic()
    import jax

    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.config import EngineConfig
    from moe_jax.distributed import connect, keep_programs, live_nodes
    from moe_jax.engine import Engine
    from moe_jax.mesh import ExpertMesh
    from serving.engine_loop import EngineLoop

    (start,) = (message.body for message in inbox.take(wait=True))
    config = EngineConfig(**start["config"])
    checkpoint = open_checkpoint(start["path"], start["load_format"])
    if start["cache"] is not None:
        keep_programs(start["cache"], start["share_programs"], start["timeout"])
    client = connect(start["address"], rank, start["num_nodes"], int(start["timeout"]))
    channel.send({"type": "joined"})

    (epoch,) = (message.body for message in inbox.take(wait=True))
    ranks: list[int] = epoch["ranks"]
    live = live_nodes(client, ranks)
    if live != sorted(ranks):
        raise RuntimeError(f"epoch {epoch['number']}: found ranks {live} live, expected {ranks}")
    by_rank = {device.process_index: device for device in jax.devices()}
    mesh = ExpertMesh(tuple(by_rank[r] for r in ranks))
    joined = time.monotonic()
    engine = Engine(checkpoint, config, mesh)
    loaded = time.monotonic()
    engine.warm_up()
    seconds = {"join": joined - begun, "load": loaded - joined, "compile": time.monotonic() - loaded}
    loop = EngineLoop(engine, Outbox(channel).send)
    channel.send({"type": "ready", "epoch": epoch["number"], "seconds": seconds, **loop.status()})
    loop.run(inbox)


def main() -> None:
    channel = Channel.inherited(int(sys.argv[2]))
    inbox = Inbox(channel)  # before anything slow is imported: from here on this process ends with its parent
    try:
        serve(int(sys.argv[1]), channel, inbox)
    except BaseException as e:
        traceback.print_exc()
        with contextlib.suppress(Exception):
            channel.send({"type": "error", "kind": type(e).__name__, "message": str(e)[:4000]})
    finally:
        sys.stderr.flush()
        os._exit(1)  # not by way of destructors, which wait for lost peers


if __name__ == "__main__":
    main()
