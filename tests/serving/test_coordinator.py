"""Coordinator, supervisors and launcher as real processes over real sockets, with engines that compute nothing.

Every test ends with what a client must see, whatever happened: exactly the tokens, each once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import grpc
import numpy as np
import pytest

from moe_jax import placement
from moe_jax.request import Request, SamplingParams
from serving.coordinator import Unavailable
from serving.journal import Journal
from serving.ledger import AlreadyExists
from serving.protos import cluster_pb2 as pb
from serving.protos import cluster_pb2_grpc as rpc
from serving.rebalancing import Policy
from serving.recycling import recycle
from serving.worker import DISMISSED, PROTOCOL
from tests.serving.clusters import Running, fake_cluster, kill
from tests.serving.fake_engine import tokens

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

FOUR = ("a", "b", "c", "d")
PAIRS = ("a", "a", "b", "b", "c", "c")


def run(scenario: Callable[[Running], Awaitable[None]], cluster: Any, **options: Any) -> None:
    """The scenario, on a cluster of its own, with streams that flow before and after."""

    async def main() -> None:
        async with Running(cluster, **options) as r:
            await scenario(r)
            await r.finish()

    asyncio.run(main())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# One process


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("which", ["engine", "supervisor"])
def test_killed(rank, which):
    async def scenario(r: Running) -> None:
        r.submit(8, 400)
        await r.flowing()
        engine, supervisor, epoch = r.engine(rank), r.supervisor(rank), r.status()["epoch"]
        kill(engine if which == "engine" else supervisor, SIGKILL)
        await r.serving(after=epoch)
        assert not alive(engine) and not alive(supervisor)
        assert r.states[-3:] == ["RECOVERING", "RECOVERING", "SERVING"]
        lost, back = r.status()["recoveries"]
        assert (lost["lost"], lost["joined"], back["lost"], back["joined"]) == ([rank], [], [], [rank])
        await r.flowing()
        assert lost["pause_ms"] < 1000

    run(scenario, fake_cluster(FOUR, fake={"step": 0.005}))


@pytest.mark.parametrize("which, platform", [("engine", "cpu"), ("engine", "cuda"), ("supervisor", "cpu")])
def test_stopped(which, platform):
    """Started again: whoever is stopped is killed for it, and comes back; on a GPU an engine a little later."""

    async def scenario(r: Running) -> None:
        r.submit(8, 800)
        await r.flowing()
        engine, supervisor, epoch = r.engine(0), r.supervisor(0), r.status()["epoch"]
        kill(engine if which == "engine" else supervisor, SIGSTOP)
        await r.until(lambda: r.live() == [1, 2, 3])
        await r.flowing()
        await r.serving(after=epoch + 1)
        assert not alive(engine) and not alive(supervisor)

    run(scenario, fake_cluster(FOUR, fake={"step": 0.005}), platform=platform)


@pytest.mark.parametrize("which", ["engine", "supervisor"])
def test_continued_too_late(which):
    """Without restarts: a fenced worker that wakes up learns it and exits, and what it still says changes nothing."""

    async def scenario(r: Running) -> None:
        r.submit(8, 500)
        await r.flowing()
        engine, supervisor = r.engine(1), r.supervisor(1)
        stopped = engine if which == "engine" else supervisor
        kill(stopped, SIGSTOP)
        await r.serving([0, 2, 3])
        if which == "supervisor":  # its engine goes on, and all it says waits in a socket
            assert alive(engine) and alive(supervisor)
        await r.flowing()
        if alive(stopped):
            kill(stopped, SIGCONT)
        await r.until(lambda: r.ended == [(1, DISMISSED)])
        await r.until(lambda: not alive(engine) and not alive(supervisor))
        await r.flowing()
        assert r.live() == [0, 2, 3]

    run(scenario, fake_cluster(FOUR, fake={"step": 0.005}), restart=False)


@pytest.mark.parametrize(("fake", "patience", "least"), [({"halt": 0.2}, 60.0, 0.2), ({"busy": 3}, 0.3, 0.3)])
def test_survivors_halt_before_the_fence(fake, patience, least):
    """As on GPUs: a lost rank is fenced when all others have halted, or after a while."""

    async def scenario(r: Running) -> None:
        r.submit(8, 400)
        await r.flowing()
        epoch = r.status()["epoch"]
        kill(r.engine(1), SIGKILL)
        await r.serving(after=epoch)
        assert r.status()["recoveries"][0]["fence_ms"] >= 1e3 * least - 1
        await r.flowing()

    cluster = fake_cluster(FOUR, fake={"step": 0.005, **fake}, fence_timeout_s=70.0)
    run(scenario, replace(cluster, halt_s=patience))


def test_survivors_halt_before_each_fence():
    """They hear of the second loss, though their epoch has been over since the first."""

    async def scenario(r: Running) -> None:
        r.submit(8, 400)
        await r.flowing()
        epoch = r.status()["epoch"]
        kill(r.engine(0), SIGKILL)
        await r.until(lambda: r.status()["state"] == "RECOVERING")
        await asyncio.sleep(0.3)  # it is fenced
        kill(r.engine(3), SIGKILL)
        await r.serving([1, 2], after=epoch)
        recovery = r.status()["recoveries"][0]
        assert recovery["lost"] == [0, 3] and recovery["fence_ms"] >= 399  # the second fence
        await r.flowing()

    fake = {"step": 0.005, "halt": 0.1}
    cluster = fake_cluster(FOUR, slots=6, replication=3, fake=fake, window_s=0.5, fence_timeout_s=70.0)
    run(scenario, replace(cluster, halt_s=60.0), restart=False)


# More than one


def test_two_hosts_at_once():
    async def scenario(r: Running) -> None:
        r.submit(12, 500)
        await r.flowing()
        epoch = r.status()["epoch"]
        for rank in (0, 3):
            kill(r.supervisor(rank), SIGKILL)
        await r.serving(after=epoch + 1)
        assert r.status()["recoveries"][0]["lost"] == [0, 3]  # one epoch for both

    run(scenario, fake_cluster(FOUR, slots=6, replication=3, fake={"step": 0.005}, window_s=0.3))


def test_a_host_of_two_ranks():
    async def scenario(r: Running) -> None:
        r.submit(12, 500)
        await r.flowing()
        epoch = r.status()["epoch"]
        r.launcher.kill_host("b")
        await r.serving(after=epoch + 1)
        assert r.status()["recoveries"][0]["lost"] == [2, 3]
        assert r.status()["experts"]["missing"] == 0

    run(scenario, fake_cluster(PAIRS, slots=3, fake={"step": 0.005}, window_s=0.3))


def test_another_while_recovering_and_another_while_joining():
    async def scenario(r: Running) -> None:
        r.submit(12, 800)
        await r.flowing()
        kill(r.engine(0), SIGKILL)
        await r.until(lambda: r.status()["state"] == "RECOVERING")
        await asyncio.sleep(0.1)  # epoch 2 is being entered
        kill(r.engine(2), SIGKILL)
        await r.until(lambda: r.status()["ranks"][0]["state"] == "joining")
        await r.until(lambda: r.engine(0) is not None)
        kill(r.engine(0), SIGKILL)  # the joiner, while it loads: nobody else notices
        await r.until(lambda: r.status()["ranks"][0]["state"] == "joining")
        kill(r.engine(3), SIGKILL)  # a member, while others load
        await r.serving(after=4)

    run(scenario, fake_cluster(FOUR, slots=8, replication=4, fake={"step": 0.005, "enter": 0.2, "load": 0.3}))


def test_again_and_again(monkeypatch: pytest.MonkeyPatch):
    """Orders of ranks, each good for one mesh, are used up; a new generation takes over. Nothing is left behind."""
    monkeypatch.setattr("serving.launcher._BACKOFF", (0.1, 0.1))  # else most of the time is spent waiting for workers

    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    async def scenario(r: Running) -> None:
        r.submit(6, 3000)
        before = held()
        for i in range(8):
            await r.flowing()
            epoch = r.status()["epoch"]
            kill(r.engine(i % 2), SIGKILL)
            await r.serving(after=epoch)
        assert r.status()["generation"] > 1
        c = r.coordinator
        assert len(c._streams) <= 8 and len(c._current) == 3 and len(c._services) == 1
        await r.until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))

    run(scenario, fake_cluster(FOUR[:3], slots=8, replication=3, fake={"step": 0.002}))


# The JAX service


@pytest.mark.parametrize("signal", [SIGKILL, SIGSTOP])
def test_service_lost(signal):
    async def scenario(r: Running) -> None:
        r.submit(8, 800)
        await r.flowing()
        kill(r.status()["service_pid"], signal)
        if signal == SIGSTOP:
            kill(r.engine(2), SIGKILL)  # now it is needed
        await r.until(lambda: r.status()["generation"] == 2)
        await r.serving()
        await r.flowing()

    run(scenario, fake_cluster(FOUR, fake={"step": 0.005, "dies_with_service": signal == SIGKILL}))


# Coming and going


def test_start_without_a_rank_and_grow():
    async def scenario(r: Running) -> None:
        assert r.live() == [0, 1, 3] and r.status()["generation"] == 1
        r.submit(8, 600)
        await r.flowing()
        r.launcher.start([2])
        await r.until(lambda: r.status()["generation"] == 2)
        await r.serving()
        await r.flowing()

    run(scenario, fake_cluster(FOUR, fake={"step": 0.005}, start_grace_s=2.5), ranks=[0, 1, 3])


def test_drain_and_return():
    async def scenario(r: Running) -> None:
        with pytest.raises(LookupError, match="'x', expected one of a, b, c"):
            await r.coordinator.drain("x")
        r.submit(12, 900)
        await r.flowing()
        r.launcher._restart = True
        drained = await asyncio.gather(r.coordinator.drain("b"), r.coordinator.drain("b"))  # asked for twice
        assert [d["ranks"] for d in drained] == [[2, 3], [2, 3]]
        assert r.live() == [0, 1, 4, 5]
        await r.until(lambda: sorted(r.ended) == [(2, DISMISSED), (3, DISMISSED)])
        assert "UNSERVABLE" not in r.states
        await r.flowing()
        assert r.live() == [0, 1, 4, 5]  # it is not started again before
        assert (await r.coordinator.undrain("b"))["ranks"] == [2, 3]
        await r.serving()
        drained = r.status()["recoveries"][0]
        assert drained["cause"] == "drain" and drained["lost"] == [2, 3] and drained["pause_ms"] < 500

    run(scenario, fake_cluster(PAIRS, slots=4, fake={"step": 0.005}))


def test_told_to_end():
    """A worker that gets SIGTERM leaves in order, and its host's other ranks with it. Where it cannot be spared it ends
    all the same."""

    async def leave(r: Running) -> None:
        r.submit(12, 900)
        await r.flowing()
        r.launcher._restart = True
        epoch = r.status()["epoch"]
        kill(r.supervisor(3), SIGTERM)
        await r.until(lambda: sorted(r.ended) == [(2, DISMISSED), (3, 0)])
        await r.serving(after=epoch + 1)
        first, *rest = (change["cause"] for change in r.status()["recoveries"])
        assert first == "drain" and {*rest} == {"join"} and "RECOVERING" not in r.states

    async def refused(r: Running) -> None:
        kill(r.supervisor(1), SIGTERM)
        await r.until(lambda: r.ended == [(1, 0)])
        await r.serving()

    run(leave, fake_cluster(PAIRS, slots=4, fake={"step": 0.005}, heartbeat_timeout_s=5.0))
    run(refused, fake_cluster(FOUR[:2], slots=4, replication=1, heartbeat_timeout_s=5.0))


def test_refused_drain():
    async def scenario(r: Running) -> None:
        with pytest.raises(Unavailable, match="too few slots"):
            await r.coordinator.drain("a")

    run(scenario, fake_cluster(FOUR[:2], slots=4, replication=1))


def test_too_few_slots_and_back():
    """Accepted requests wait, new ones are refused, and all goes on when the rank is back."""

    async def scenario(r: Running) -> None:
        r.submit(6, 400)
        await r.flowing()
        kill(r.engine(1), SIGKILL)
        await r.until(lambda: r.status()["state"] == "UNSERVABLE")
        with pytest.raises(Unavailable, match="too few slots"):
            r.submit(1, 5)
        await r.serving()

    run(scenario, fake_cluster(FOUR[:3], slots=3, replication=1, fake={"step": 0.005, "load": 0.3}))


def test_one_that_does_not_enter():
    async def scenario(r: Running) -> None:
        r.submit(6, 600)
        await r.flowing()
        kill(r.engine(1), SIGKILL)
        await r.until(lambda: any(x["lost"] == [3] for x in r.status()["recoveries"]))
        await r.serving()

    deaf = {"rank": 3, "epoch": 2}
    run(scenario, fake_cluster(FOUR, slots=8, fake={"step": 0.005, "deaf": deaf}, enter_timeout_s=0.5))


def test_one_with_other_kernels_is_kept_out(caplog):
    """In the mesh it would give requests other bits, or end everybody's engine."""
    caplog.set_level("INFO")
    fake: dict[str, Any] = {"step": 0.005}

    async def scenario(r: Running) -> None:
        r.submit(6, 600)
        await r.flowing()
        fake["kernels"] = 3
        kill(r.engine(3), SIGKILL)
        r.launcher._restart = True
        await r.until(lambda: "its kernels are not those of rank" in caplog.text)
        assert r.live() == [0, 1, 2]

    run(scenario, fake_cluster(FOUR, slots=8, fake=fake))


def test_workers_that_do_not_belong():
    async def scenario(r: Running) -> None:
        async with grpc.aio.insecure_channel(r.coordinator.address) as channel:
            for hello, reason in (
                (pb.Hello(rank=1, host="x", version=PROTOCOL), "expected host 'b'"),
                (pb.Hello(rank=9, host="x", version=PROTOCOL), "expected a rank from 0 to 3"),
                (pb.Hello(rank=1, host="b", version="0"), "found protocol '0'"),
                (pb.Hello(rank=1, host="b", version=PROTOCOL, incarnation=2), "was lost as incarnation 2"),
            ):
                call = rpc.ClusterStub(channel).Control()
                await call.write(pb.WorkerMessage(hello=hello))
                while (answer := await call.read()).WhichOneof("kind") != "dismiss":
                    pass
                assert reason in answer.dismiss.reason
            call = rpc.ClusterStub(channel).Control()
            await call.write(pb.WorkerMessage(heartbeat=pb.Heartbeat()))
            with pytest.raises(grpc.aio.AioRpcError, match="expected Hello"):
                await call.read()
        r.submit(4, 200)
        assert r.live() == [0, 1, 2, 3] and all(r.engine(rank) for rank in range(4))
        kill(r.supervisor(1), SIGKILL)
        await r.serving(after=2)

    run(scenario, fake_cluster(FOUR))


# Requests


def test_attaching_cancelling_and_finishing():
    async def scenario(r: Running) -> None:
        r.submit(2, 300)
        await r.flowing(20)
        c, asked, late = r.coordinator, r.entries["r0"].asked, []
        assert c.submit(asked, late.append) is r.entries["r0"] and len(late) >= 20
        with pytest.raises(AlreadyExists):
            c.submit(Request("r0", [1], SamplingParams(seed=0)), late.append)
        with pytest.raises(ValueError, match="prompt: found 99999 tokens"):
            c.submit(Request("long", [1] * 99999, SamplingParams(seed=0)), late.append)
        seen: list[int] = []
        forever = SamplingParams(max_tokens=10000, seed=5, ignore_eos=True)
        entry = c.submit(Request("cancelled", [1], forever), lambda e: seen.append(e.token))
        await r.until(lambda: len(seen) > 10)
        c.cancel(entry)
        count = len(seen)

        def until_ten(event):
            stopped.append(event.token)
            if event.index == 9:
                c.finish(entry_of_stopped)

        stopped: list[int] = []
        entry_of_stopped = c.submit(Request("stopped", [1], forever), until_ten)
        await r.until(lambda: len(stopped) == 10)
        await r.finish()
        assert [e.token for e in late] == tokens(0, 300) and stopped == tokens(5, 10) and len(seen) == count
        assert not c.router._listeners and not c._recoveries._last

    run(scenario, fake_cluster(FOUR, fake={"step": 0.002}))


def test_a_coordinator_with_a_journal_goes_on_where_another_was(tmp_path):
    async def first(journal: Journal) -> list[int]:
        async with Running(fake_cluster(FOUR[:2], fake={"step": 0.005}), journal=journal) as r:
            r.submit(4, 60)
            await r.until(lambda: len(r.streams["r3"]) == 60)
            r.submit(4, 400)
            await r.flowing(50)
            return [len(events) for events in r.streams.values()]

    async def second(journal: Journal, before: list[int]) -> None:
        cluster = fake_cluster(FOUR[:2], fake={"step": 0.005})
        async with Running(cluster, journal=journal) as r:
            assert r.status()["epoch"] == 2 and r.status()["generation"] == 2
            await r.flowing(10)
            r.submit(4, 60)  # these had ended
            r.submit(4, 400)  # and these had not
            assert [len(events) >= count for events, count in zip(r.streams.values(), before, strict=True)]
            await r.finish()

    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        before = asyncio.run(first(journal))
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        asyncio.run(second(journal, before))


def test_worn_engines_are_replaced_one_by_one(monkeypatch: pytest.MonkeyPatch):
    """The streams do not notice."""
    monkeypatch.setattr("serving.recycling._LOOK", 0.1)

    async def scenario(r: Running) -> None:
        async def keep_busy() -> None:  # without tokens there is no pause to be measured
            while True:
                r.submit(4, 400)
                await asyncio.sleep(1.0)

        busy = asyncio.create_task(keep_busy())
        await asyncio.sleep(0)
        kill(r.engine(3), SIGKILL)  # an epoch more for the others, and another when it is back
        await r.serving(after=2)
        recycling = asyncio.create_task(recycle(r.coordinator, 2))
        first = [r.engine(rank) for rank in range(4)]
        await r.until(lambda: not set(first) & {r.engine(rank) for rank in range(4)}, 60)
        recycling.cancel()
        await r.serving()
        await r.flowing()
        busy.cancel()
        changes = r.status()["recoveries"]
        assert {x["cause"] for x in changes[1:]} == {"drain", "join"}
        assert max(x["pause_ms"] for x in changes[1:]) < 500

    run(scenario, fake_cluster(FOUR, slots=6, fake={"step": 0.005}))


def test_score_survives():
    async def scenario(r: Running) -> None:
        scoring = [asyncio.create_task(r.coordinator.score([1] * 7)) for _ in range(8)]
        await asyncio.sleep(0.05)
        kill(r.engine(1), SIGKILL)
        for score in scoring:
            assert np.array_equal(await score, np.zeros((7, 64), np.float32))
        answers = await r.coordinator.ask({"type": "status"})
        assert sum(a["steps"] > 0 for a in answers.values()) >= 2

    run(scenario, fake_cluster(FOUR, fake={"step": 0.3}))


def test_idle_engines_are_left_alone():
    """No step is taken, and a killed one is replaced all the same."""

    async def scenario(r: Running) -> None:
        kill(r.engine(2), SIGKILL)
        await r.serving(after=2)
        assert all(a["steps"] == 0 for a in (await r.coordinator.ask({"type": "status"})).values())
        assert r.status()["recoveries"][0]["pause_ms"] is None
        assert len(os.listdir("/proc/self/fd")) < 100
        serving = r.coordinator.placement
        await asyncio.wait_for(r.coordinator.move(serving.number, serving.slots), 5)  # nothing is to move
        assert r.coordinator.placement is serving

    run(scenario, fake_cluster(FOUR))


@pytest.mark.parametrize("sizes", [[4, 3], [4]])
def test_the_first_step_after_a_loss_is_for_what_has_to_be_prefilled_again(sizes: list[int]):
    """All ranks are told of the same; of nothing where not all have the programs of the mesh."""

    async def scenario(r: Running) -> None:
        r.submit(16, 100)  # four on each rank; prompts of 3 tokens, and of two tiles once 14 more are known
        await r.flowing(14)
        kill(r.engine(1), SIGKILL)
        await r.serving([0, 2, 3], after=1)
        told = {a["prefill"] for a in (await r.coordinator.ask({"type": "status"})).values()}
        assert told == {2 * 32 if 3 in sizes else 0}  # one of three ranks takes two of the four

    run(scenario, fake_cluster(FOUR, fake={"step": 0.05, "sizes": sizes}), restart=False)


# Load


def test_experts_follow_their_load():
    """One expert of each layer gets most tokens: by itself the coordinator lays them out anew, a layer at a time, and
    says so; streams go on, and what is promised holds in every epoch."""
    hot = [[1] * 8, [1] * 8]
    hot[0][3], hot[1][5], hot[1][0] = 12, 7, 4

    async def scenario(r: Running) -> None:
        served: list[np.ndarray] = []
        r.coordinator.watcher.served = lambda epoch: served.append(epoch.slots)
        assert r.status()["experts"]["imbalance"] is None, "nothing is known"
        r.submit(8, 600)
        await r.flowing()
        rebalancing = r.coordinator.rebalancing
        await r.until(lambda: rebalancing.changes == 1)
        load = np.array(r.coordinator.status(load=True)["load"])
        assert np.allclose(load / load.sum(), np.array(hot) / np.sum(hot), atol=0.01)
        moves = [s for s in r.status()["switches"] if s["cause"] == "rebalance"]
        assert len(moves) == len(served) >= 1 and not r.status()["recoveries"]
        assert all(placement.survivable_host_losses(slots, FOUR, 8) >= 1 for slots in served)
        assert rebalanced_from is not None
        before = placement.imbalance(rebalanced_from, range(4), load, 8)
        assert r.status()["experts"]["imbalance"] < before - rebalancing.policy.gain
        await r.flowing()
        await asyncio.sleep(0.5)
        assert rebalancing.changes == 1, "what cannot become better stays"

    policy = Policy(above=1.05, within=1.0, every=0.1, rest=0.0, enough=10.0)
    cluster = fake_cluster(FOUR, slots=5, fake={"routes": hot, "step": 0.005}, policy=policy)
    rebalanced_from = cluster.rules.plan(range(4))
    assert rebalanced_from is not None
    run(scenario, cluster)


def test_a_loss_while_experts_are_moved():
    """The change is given up, and whoever asked for it is told; streams go on."""

    async def scenario(r: Running) -> None:
        r.submit(8, 800)
        await r.flowing()
        epoch = r.coordinator.placement
        goal = epoch.slots[:, :, ::-1].copy()
        moving = asyncio.ensure_future(r.coordinator.move(epoch.number, goal))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="a change on its way"):
            await r.coordinator.move(epoch.number, goal)
        kill(r.engine(2), SIGKILL)
        with pytest.raises(Unavailable, match=r"came between \(loss\)"):
            await moving
        await r.serving(after=epoch.number)
        await r.until(lambda: r.coordinator._membership.busy is None)
        with pytest.raises(Unavailable, match=f"expected {epoch.number}"):
            await r.coordinator.move(epoch.number, goal)
        now = r.coordinator.placement
        await r.coordinator.move(now.number, goal)
        assert np.array_equal(r.coordinator.placement.slots, goal)
        assert r.coordinator.epoch == now.number + len(goal), "one layer an epoch"

    run(scenario, fake_cluster(FOUR, fake={"step": 0.005}))
