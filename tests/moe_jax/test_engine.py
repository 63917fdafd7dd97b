"""The engine as a whole: nothing is compiled while serving, and nobody is forgotten."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import reference

import moe_jax.executables
from moe_jax.checkpoint import load_params, open_checkpoint
from moe_jax.engine import Engine
from moe_jax.executables import Executables, Program, compilations
from moe_jax.kernels.hopper_ffn import hopper_ffn_reference
from moe_jax.kernels.paged_attention import paged_attention_reference
from moe_jax.llm import model_directory
from moe_jax.mesh import ExpertMesh
from moe_jax.programs import ProgramStore
from moe_jax.sampling import sample
from tests.engines import make_engine, request, run


@pytest.mark.parametrize("ranks, ahead", [(1, True), (4, False)])
def test_nothing_is_compiled_while_serving(ranks: int, ahead: bool) -> None:
    """500 requests of random length, parameters and time of arrival after the warm-up."""
    engine = make_engine(ranks=ranks, return_logits=False, prefix_caching=True)
    rng = np.random.default_rng(ranks)
    counted = compilations.count
    jax.jit(lambda x: x + ranks)(0)
    before = compilations.count
    assert before > counted, "the counter counts"
    waiting = [
        request(
            f"r{i}",
            rng.integers(5, 4096, int(rng.choice([1, 5, 30, 90]))).tolist(),
            int(rng.integers(1, 7)),
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 1, 40])),
            top_p=float(rng.choice([1.0, 0.9])),
            logprobs=[None, 0, 5][int(rng.integers(3))],
            seed=i,
        )
        for i in range(500)
    ]
    expected = {r.request_id: r.params.max_tokens for r in waiting}
    found: dict[str, int] = {}
    while waiting or engine.has_work:
        for r in waiting[: rng.integers(0, 12)]:
            engine.add(int(rng.integers(ranks)), r)
            waiting.remove(r)
        for event in engine.step(ahead) if engine.has_work else []:
            found[event.request_id] = found.get(event.request_id, 0) + 1
    assert found == expected
    assert compilations.count == before


def test_compilations_are_counted_for_the_thread_that_waits_for_them() -> None:
    def compile_something() -> None:
        jax.jit(lambda x: x - 17)(np.float32(1))

    before = compilations.count, compilations.own
    compile_something()
    here = compilations.own - before[1]
    thread = threading.Thread(target=compile_something)
    thread.start()
    thread.join()
    assert compilations.own - before[1] == here > 0
    assert compilations.count - before[0] == 2 * here


def test_rehearsal_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an engine that may be left alone one day runs its programs once before it serves."""
    prompts = [[5, 6, 7], list(range(10, 80))]
    expected = run(make_engine(), [request(f"r{i}", p) for i, p in enumerate(prompts)])
    engine, ran = make_engine(), []
    mesh = engine.mesh
    assert mesh is not None
    engine.leave()
    engine.rehearse_alone()
    assert engine.mesh is None and not ran  # on a CPU there is nothing to be gained
    monkeypatch.setattr(engine, "warm_up", lambda warm_up=engine.warm_up: ran.append(engine.mesh) or warm_up())
    with monkeypatch.context() as patch:
        programs = {name: getattr(engine.programs, name) for name in ("wanted", "load", "load_all", "call")}
        as_of_gpu = SimpleNamespace(kind="NVIDIA H200", missing=lambda programs: [], **programs)
        patch.setattr(engine, "programs", as_of_gpu)
        engine.rehearse_alone()
    assert engine.mesh is None and ran == [engine.own]
    engine.enter(2, mesh, engine.slots)
    assert run(engine, [request(f"r{i}", p) for i, p in enumerate(prompts)]) == expected


def test_what_makes_a_mesh_ready_leaves_no_trace() -> None:
    """Steps and writes on nothing, while the cache holds something."""
    prompts = [[5, 6, 7], list(range(10, 80))]
    first, second = ([request(f"{name}{i}", p) for i, p in enumerate(prompts)] for name in "ab")
    undisturbed, engine = make_engine(ranks=2), make_engine(ranks=2)
    assert run(undisturbed, first) == run(engine, first)
    mesh, buckets = engine.own, [b for b in engine.buckets if not b.score]
    assert engine.has_steps(2) and engine.connect(mesh, True) and not engine.connect(mesh, False)
    counted, steps = compilations.count, engine.steps
    cache = {name: np.asarray(a) for name, a in engine.cache.items()}
    for bucket in buckets:
        engine.load_step(mesh, bucket)
        engine.rehearse(mesh, bucket)
    assert (compilations.count, engine.steps) == (counted, steps)
    for name, array in engine.cache.items():
        np.testing.assert_array_equal(array, cache[name])
    assert run(undisturbed, second) == run(engine, second)


def test_the_first_step_of_an_epoch_takes_up_what_all_were_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so takes one less; tokens are the same. In the mesh of before it is the step that was agreed on."""
    moved = request("r", list(range(10, 40)))
    expected, steps = run(make_engine(), [moved]), []
    monkeypatch.setattr(Engine, "_alone", False)  # as where other ranks are elsewhere
    for prefill in (0, 32, 10_000):
        engine = make_engine()
        mesh = engine.mesh
        assert mesh is not None
        engine.leave()
        engine.enter(2, mesh, engine.slots, prefill=prefill)
        first = engine.buckets[(engine.level or 1) - 1]
        assert first.rows == engine.config.max_batch + min(prefill, engine.config.max_prefill_rows)
        engine.enter(3, mesh, engine.slots, prefill=32 - prefill)
        assert engine.buckets[(engine.level or 1) - 1] == first
        assert run(engine, [moved]) == expected
        steps.append(engine.steps)
    assert steps == [9, 8, 8]


@pytest.mark.parametrize(
    "found, able", [(3, False), (6, False), (12, True), (4, None), (15, None), (0, None), (-3, None)]
)
def test_a_mesh_is_ready_if_all_its_ranks_are(found: int, able: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three, none, one and all say so; the other sums are what an aborted collective leaves."""
    engine = make_engine(ranks=3)
    monkeypatch.setattr(type(engine.programs), "load", lambda *_: lambda _: [[np.array([found])]])
    if able is None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="was aborted"):
            engine.connect(engine.own, True)
    else:
        assert engine.connect(engine.own, True) == able


def test_who_loads_a_program_at_the_same_time_has_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was run has its code on the device."""
    engine, both = make_engine(), threading.Barrier(2)
    engine.programs.keep_only()

    def slow(program: bytes, devices: Any) -> object:
        both.wait(10)
        return object()

    monkeypatch.setattr(moe_jax.executables, "load_program", slow)
    program = Program("step", engine.buckets[0], 1)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: engine.programs.load(program, engine.own.devices), range(2)))
    assert found[0] is found[1] is engine.programs.load(program, engine.own.devices)


@pytest.mark.parametrize("ranks", [1, 4])
def test_counts_the_tokens_of_each_expert(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the plain forward pass routes there; those of a failed step or of padding are none."""
    engine = make_engine(ranks=ranks, prefix_caching=False)
    assert engine.loads() is None
    engine.look_at_loads()
    before = engine.loads()
    assert before is not None and not before.any(), "warming up counts nothing"
    requests = [request(f"r{i}", [7 + i, 99, 1000 + i] * (1 + 9 * i), 6) for i in range(4)]
    tokens = run(engine, requests)
    engine.look_at_loads()
    found = engine.loads()
    chosen: list[np.ndarray] = []
    plain = reference.route
    monkeypatch.setattr(reference, "route", lambda *args: chosen.append(plain(*args)) or chosen[-1])
    c = engine.model
    slots = np.tile(np.arange(c.num_experts, dtype=np.int32), (c.num_moe_layers, 1))
    params = load_params(open_checkpoint(model_directory("demo")), slots, jax.local_devices()[0], "float32")
    expected = np.zeros((c.num_moe_layers, c.num_experts), np.int64)
    for r in requests:
        chosen.clear()
        reference.logprobs(c, params, [*r.token_ids, *tokens[r.request_id]][:-1])
        expected += [(weights != 0).sum(0) for weights in chosen]
    assert found is not None and np.array_equal(found, expected)
    engine.look_at_loads()
    again = engine.loads()
    assert again is not None and not again.any(), "each token is told of once"


def test_without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs: the same up to rounding."""
    requests = [request(f"r{i}", [7 + i] * n, 3) for i, n in enumerate((5, 30, 70))]
    expected = make_engine(ranks=2)
    tokens = run(expected, requests)
    looped = Executables.run
    monkeypatch.setattr(Executables, "run", lambda *args: replace(looped(*args), straight=True, kernels="xla"))
    monkeypatch.setattr("tests.engines.PROGRAMS", ProgramStore(None))
    engine = make_engine(ranks=2, warm_up=False)
    assert run(engine, requests) == tokens
    assert engine.logits.keys() == expected.logits.keys()
    for key, logits in engine.logits.items():
        np.testing.assert_allclose(logits, expected.logits[key], atol=1e-4)
    for bucket in engine.buckets:  # the host waits at no branch
        program, mesh = Program("step", bucket, 2), engine.own
        lowered = engine.programs.step(bucket, mesh).lower(*engine.programs.arguments(program, mesh)).as_text()
        assert "stablehlo.case" not in lowered and "stablehlo.if" not in lowered


def test_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as it is around the kernels of a Hopper GPU, with their plain versions: the same up to rounding."""

    def paged_attention(*args: Any) -> tuple[jax.Array, jax.Array]:
        out, lse = paged_attention_reference(*args[:-1])  # without the number of parts
        return out[:, None], lse[:, None]

    requests = [request(f"r{i}", [7 + i] * n, 3) for i, n in enumerate((5, 30, 70))]
    expected = make_engine(ranks=2)
    tokens = run(expected, requests)
    monkeypatch.setattr("moe_jax.kernels.sampling.sample", partial(sample, straight=True))
    monkeypatch.setattr("moe_jax.executables.choose", lambda *args: "hopper")
    monkeypatch.setattr("moe_jax.executables.prepared_dtype", lambda dtype, platform: dtype)
    monkeypatch.setattr("moe_jax.kernels.hopper_ffn.hopper_ffn", hopper_ffn_reference)
    monkeypatch.setattr("moe_jax.hopper.paged_attention", paged_attention)
    monkeypatch.setattr("tests.engines.PROGRAMS", ProgramStore(None))
    engine = make_engine(ranks=2, warm_up=False)
    assert run(engine, requests) == tokens
    for key, logits in engine.logits.items():
        np.testing.assert_allclose(logits, expected.logits[key], atol=1e-4)


@pytest.mark.parametrize("silent", [False, True])
def test_a_failed_step_changes_nothing(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host dies in the middle of a step, which shows where its result is read: the step is repeated. Silent: nothing
    fails, and what is read is another step's result."""
    engine = make_engine(ranks=2, return_logits=False)
    monkeypatch.setattr(ExpertMesh, "is_local", False)  # so that hosts could be lost
    requests = [request(f"r{i}", [7 + i] * (5 + 20 * i), 6) for i in range(4)]
    undisturbed = run(engine, requests)
    failures = iter([True, False] * 100)
    load = engine.programs.load

    class Lost:
        """What a failed collective leaves: an array that raises when it is read."""

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise RuntimeError("a host is lost")

    def fail_every_other(program: Program, devices: Any) -> Any:
        run = load(program, devices)
        if program.kind == "write" or not next(failures):
            return run
        return lambda arguments: [*stale[:1], *run(arguments)[1:]] if silent else [[Lost()] for _ in run(arguments)]

    stale = [[np.zeros((1, 1 << 16), np.int32)] * 2]
    object.__setattr__(engine.programs, "load", fail_every_other)
    for r in requests:
        engine.add(0, r)
    found: dict[str, list[int]] = {r.request_id: [] for r in requests}
    failed = 0
    while engine.has_work:
        try:
            for event in engine.step():
                found[event.request_id].append(event.token)
        except RuntimeError:
            failed += 1
    assert failed > 5 and found == undisturbed


def test_epochs_leave_nothing_behind() -> None:
    """Neither programs that were loaded for meshes of former epochs, nor arrays, nor threads."""
    engine, devices = make_engine(return_logits=False), jax.devices()
    counts = []
    for epoch in range(2, 8):
        engine.enter(epoch, engine.own, engine.slots)
        ahead = (devices[1 + epoch % 3],)  # as if it were what a loss leaves
        engine.programs.keep_only(engine.own.devices, ahead)
        for bucket in engine.buckets:
            engine.programs.load(Program("step", bucket, 1), ahead)
        engine.prepare(engine.own, engine.slots)
        assert len(run(engine, [request(f"r{epoch}", [5, 6, 7])])[f"r{epoch}"]) == 8
        gc.collect()
        programs = len(devices[0].client.live_executables())
        counts.append((programs, len(jax.live_arrays()), threading.active_count()))
    assert counts[1:] == counts[1:2] * 5, counts
