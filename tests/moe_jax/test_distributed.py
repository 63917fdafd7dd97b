"""Ranks that give up in the middle of collectives, or while they connect, leave nobody behind.

Run as a program, this file is a rank: it obeys "epoch NUMBER RANK…" and "cut NUMBER", and says what it does. Without
arguments it is three nodes that meet.
"""

import itertools
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from moe_jax import distributed

RANKS = 4


def rank(own: int, address: str) -> None:
    client = distributed.connect(address, own, RANKS)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from moe_jax.mesh import SHARDED, ExpertMesh
    from moe_jax.moe import AXIS

    meetings = distributed.Meetings(client)
    epochs: queue.SimpleQueue[tuple[int, list[int]]] = queue.SimpleQueue()
    inside, lost, gate = [0], [0], threading.Lock()  # as EngineLoop's: nobody cuts what comes after
    meshes: list[ExpertMesh] = []  # that are being connected

    def say(*words: object) -> None:
        print(*words, flush=True)

    def cut() -> None:
        for attempt in itertools.count():
            with gate:
                if not 0 < inside[0] <= lost[0]:
                    return
                distributed.cut_collectives(address, attempt)
                if attempt > 2 and meshes and distributed.end_connecting(client, meshes[0].devices):
                    meshes.clear()
            time.sleep(0.01)

    def listen() -> None:
        for line in sys.stdin:
            kind, number, *order = line.split()
            if kind == "epoch":
                epochs.put((int(number), [int(r) for r in order]))
            else:
                lost[0] = int(number)
                threading.Thread(target=cut, daemon=True).start()

    def shield(done: threading.Event) -> None:
        while not done.wait(0.005):
            distributed.shield_collectives(address)
        distributed.shield_collectives(address)

    threading.Thread(target=listen, daemon=True).start()
    by_node = {device.process_index: device for device in jax.devices()}
    program = None
    say("ready", 0)
    while True:
        number, order = epochs.get()
        mesh = ExpertMesh(tuple(by_node[r] for r in order))
        if program is None:

            @jax.jit
            @partial(jax.shard_map, mesh=mesh.mesh, in_specs=(SHARDED,), out_specs=SHARDED, check_vma=False)
            def step(x: jax.Array) -> jax.Array:
                y = x[0]
                for _ in range(3):
                    y = lax.psum_scatter(jnp.tanh(lax.all_gather(y, AXIS)), AXIS)
                return (y + lax.pmax(y[:6, 0].astype(jnp.int32), AXIS)[0])[None]

            shape = jax.ShapeDtypeStruct((RANKS, 16, 64), np.float32, sharding=mesh.sharding(SHARDED))
            program = distributed.serialize_program(step.lower(shape), True)
        run = distributed.load_program(program, mesh.devices)
        meetings.live_nodes(f"epoch-{number}", order, 60.0, 60.0)
        done = threading.Event()
        threading.Thread(target=shield, args=(done,), daemon=True).start()
        with gate:
            meshes[:], inside[0] = [mesh], number
        say("entered", number)
        try:
            while True:
                np.asarray(run([mesh.put([np.full((1, 16, 64), own, np.float32)], SHARDED)])[0][0])
                if not done.is_set():
                    done.set()
                    meshes.clear()
                    say("stepping", number)
        except jax.errors.JaxRuntimeError:
            with gate:
                inside[0] = 0
            done.set()
            say("left", number)


class Rank:
    def __init__(self, own: int, address: str) -> None:
        command = [sys.executable, __file__, str(own), address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(line.strip())

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def until(self, *words: object) -> None:
        while self.said.get(timeout=30) != " ".join(map(str, words)):
            pass


class Late:
    """A client whose calls in JAX's barrier come late."""

    def __init__(self, client: Any) -> None:
        self.wait_at_barrier, self._client, self.calls = client.wait_at_barrier, client, 0

    def get_live_nodes(self, nodes: list[int]) -> Any:
        self.calls += 1
        time.sleep(0.3)
        return self._client.get_live_nodes(nodes)


def meet() -> None:
    address, nodes = free_address(), [0, 1, 2]
    service = distributed.start_service(address, len(nodes))
    with ThreadPoolExecutor(len(nodes)) as pool:
        lost, *clients = pool.map(lambda node: distributed.fence(address, node), nodes)  # a client like any other
        others = [Late(client) for client in clients]
        meetings = [distributed.Meetings(client) for client in others]
        early = [pool.submit(meeting.live_nodes, "epoch-1", nodes, 10.0, 0.5) for meeting in meetings]
        lost.wait_at_barrier("epoch-1", 10_000, nodes)  # and no further
        for answer in early:
            with pytest.raises(TimeoutError, match="gave no answer"):
                answer.result()
        meetings.insert(0, distributed.Meetings(distributed.fence(address, 0)))
        for name in ("epoch-2", "epoch-3"):
            answers = [pool.submit(meeting.live_nodes, name, nodes, 10.0, 5.0) for meeting in meetings]
            assert [answer.result() for answer in answers] == [nodes] * 3
            if name == "epoch-2":
                assert [client.calls for client in others] == [1, 1]
        answers = [pool.submit(meeting.meet, "all come", nodes, 10.0) for meeting in meetings]
        assert [answer.result() for answer in answers] == [True] * 3
        answers = [pool.submit(meeting.meet, "one stays away", nodes, 0.5) for meeting in meetings[1:]]
        assert [answer.result() for answer in answers] == [False] * 2
        assert not meetings[0].meet("one stays away", nodes, 0.5), "it came late"
    assert service is not None


def test_who_waits_for_a_lost_node_meets_its_next_process() -> None:
    subprocess.run([sys.executable, __file__], check=True, timeout=60)  # whose end needs no order


def free_address() -> str:
    with distributed.socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


@pytest.mark.parametrize("when", ["stepping", "entered"])
def test_nobody_is_left_behind(when: str) -> None:
    address = free_address()
    service, draw = distributed.start_service(address, RANKS), random.Random(1)
    ranks = [Rank(own, address) for own in range(RANKS)]
    try:
        for one in ranks:
            one.until("ready", 0)
        orders = list(itertools.permutations(range(RANKS)))
        for number, order in enumerate(draw.sample(orders, len(orders)), 1):
            for one in ranks:
                one.tell("epoch", number, *order)
            for one in ranks:
                one.until(when, number)
            time.sleep(draw.uniform(0.0, 0.03))
            for one in draw.sample(ranks, RANKS):  # the first one as if it were lost
                one.tell("cut", number)
                time.sleep(0.002)
            for one in ranks:
                one.until("left", number)
    finally:
        for one in ranks:
            one.process.kill()
            one.process.wait()
    assert service is not None


def test_a_peer_does_not_hear_of_a_socket_that_was_cut_and_closed(monkeypatch: pytest.MonkeyPatch):
    """It may not have shielded its end; Gloo would forget what it has to send, and wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        own = server.accept()[0]
        monkeypatch.setattr(distributed, "_peers", lambda *_, **__: iter([] if own.fileno() < 0 else [own]))
        distributed.cut_collectives("")
        distributed.cut_collectives("", 1)
        assert own.recv(1) == b"" and len(distributed._held) == 1
        own.close()
        distributed.shield_collectives("")
        peer.settimeout(0.1)
        with pytest.raises(TimeoutError):
            peer.recv(1)
        peer.sendall(b"what was to be sent")
        monkeypatch.setattr(distributed, "_HOLD", 0.0)
        distributed.shield_collectives("")
        assert not distributed._held
        with pytest.raises(ConnectionResetError):  # there is something that nobody has read
            peer.recv(1)


def test_a_descriptor_that_is_another_sockets_by_now_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """Other threads close sockets, and open new ones, between the look at a descriptor and its use."""
    with socket.socket() as doomed, socket.socket() as new:
        doomed.bind(("127.0.0.1", 0))
        new.bind(("127.0.0.1", 0))
        new.listen()
        new.settimeout(0.2)
        before = {name for name, fd in distributed.open_sockets().items() if fd == doomed.fileno()}

        def late(fd: int, dup=os.dup) -> int:
            os.dup2(new.fileno(), doomed.fileno())
            return dup(fd)

        monkeypatch.setattr(os, "dup", late)
        assert not distributed.ring(before)
        with pytest.raises(TimeoutError):
            new.accept()


def test_ring_until_nobody_is_left():
    """The sockets that are named, and no others, are called as long as they are open."""
    with socket.create_server(("127.0.0.1", 0)) as spared:
        before = distributed.open_sockets().keys()
        with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.bind("")  # a name of the kernel's choice
            doomed = distributed.open_sockets().keys() - before
            assert len(doomed) == 2 and distributed.ring(doomed)
            tcp.settimeout(5)
            unix.settimeout(5)
            tcp.accept()[0].close()
            assert unix.recv(64)
        assert not distributed.ring(doomed)
        spared.settimeout(0.05)
        with pytest.raises(TimeoutError):
            spared.accept()


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("INTERNAL: CUDA error: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered", True),
        ("RESOURCE_EXHAUSTED: CUDA_ERROR_OUT_OF_MEMORY: out of memory", False),
        ("FAILED_PRECONDITION: Incarnation id 5516166712865839189 is stale", False),
    ],
)
def test_device_is_lost(text: str, lost: bool):
    from jax.errors import JaxRuntimeError

    assert distributed.device_is_lost(JaxRuntimeError(text)) == lost


if __name__ == "__main__" and sys.argv[1:]:
    rank(int(sys.argv[1]), sys.argv[2])
elif __name__ == "__main__":
    meet()
    os._exit(0)
