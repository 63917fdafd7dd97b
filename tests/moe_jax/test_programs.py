"""Compiled programs on disk: what they are known by, that a damaged one is made anew, and who may make them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax import programs
from moe_jax.checkpoint import open_checkpoint
from moe_jax.executables import Executables, Program, compilations
from moe_jax.llm import engine_config, model_directory
from moe_jax.local import local_engine
from moe_jax.programs import ProgramStore
from moe_jax.warmup import Spec, ensure, wanted
from tests.engines import SMALL, make_engine, request, run


def executables(store: ProgramStore, kind: str = "cpu", **options: Any) -> Executables:
    checkpoint = open_checkpoint(model_directory("demo"))
    config = engine_config(checkpoint.config, 3, "cpu", **(SMALL | options))
    return Executables.of(checkpoint, config, kind, store)


def test_kept_and_found(tmp_path: Path) -> None:
    ProgramStore(tmp_path).put("k", b"program")
    assert ProgramStore(tmp_path).get("k") == b"program"
    assert ProgramStore(tmp_path).look("k") == ("present", 7)
    assert ProgramStore(tmp_path).look("other") == ProgramStore(None).look("k") == ("missing", 0)
    assert ProgramStore(tmp_path).get("other") is None
    assert [p.name for p in tmp_path.iterdir()] == ["k.program"], "nothing half written is left"


@pytest.mark.parametrize("damage", [b"", b"short", bytes(200)])
def test_a_damaged_entry_is_removed(tmp_path: Path, damage: bytes) -> None:
    store = ProgramStore(tmp_path)
    store.put("k", b"program")
    (tmp_path / "k.program").write_bytes(damage)
    with pytest.warns(UserWarning, match="damaged"):
        assert ProgramStore(tmp_path).get("k") is None
    assert not (tmp_path / "k.program").exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ProgramStore(tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot be kept"):
        store.put("k", b"program")
    assert store.get("k") == b"program"


def test_a_key_says_what_is_computed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    base = executables(ProgramStore(None))
    program = base.wanted(3)[0]
    key = base.key(program)
    assert key == executables(ProgramStore(Path("/elsewhere"))).key(program)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "elsewhere:1")
    monkeypatch.setenv("HOSTNAME", "another")
    assert key == executables(ProgramStore(None)).key(program)
    narrow = replace(base.engine, dtype="bfloat16")
    others = {
        base.key(replace(program, ranks=2)),
        base.key(replace(program, kind="write")),
        base.key(replace(program, bucket=replace(program.bucket, rows=32))),
        executables(ProgramStore(None), kind="NVIDIA H200").key(program),
        executables(ProgramStore(None), num_pages=65).key(program),
        executables(ProgramStore(None), kernels="reference").key(program),
        Executables.of(open_checkpoint(model_directory("demo")), narrow, "cpu", base.store).key(program),
        replace(base, model=replace(base.model, num_layers=base.model.num_layers + 1)).key(program),
    }
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
    others.add(base.key(program))
    monkeypatch.undo()
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    others.add(base.key(program))
    monkeypatch.setattr(programs, "source_digest", lambda: "edited")
    others.add(base.key(program))
    assert len(others) == 11 and key not in others


def test_compiled_elsewhere(tmp_path: Path) -> None:
    """Programs that other processes compiled, loaded for a mesh whose devices are in another order."""
    checkpoint = open_checkpoint(model_directory("demo"))
    config = engine_config(checkpoint.config, 3, "cpu", **(SMALL | {"return_logits": True}))
    spec = Spec(str(model_directory("demo")), "auto", config, str(tmp_path))
    seen: list[dict] = []
    ensure(spec, [3], 280, seen.append)
    made = Executables.of(checkpoint, config, "cpu", ProgramStore(tmp_path))
    assert not made.missing(wanted(made, [3])) and len(seen) == len(wanted(made, [3]))
    ensure(spec, [3], 1, seen.append)
    assert len(seen) == len(wanted(made, [3])), "nothing was compiled again"

    store = ProgramStore(tmp_path)
    devices = [jax.devices()[i] for i in (2, 0, 3)]
    engine = local_engine(checkpoint, config, devices, store)
    for bucket in config.buckets:
        assert store.get(engine.programs.key(Program("step", bucket, 3)))
    requests = [request(f"r{i}", [7 + i] * (5 + 20 * i), 6) for i in range(4)]
    found = run(engine, requests)
    reference = make_engine(ranks=1)
    assert found == run(reference, requests)
    for key, logits in reference.logits.items():
        assert (engine.logits[key] == logits).all()


def test_drawn_weights_are_compiled_for_once(tmp_path: Path) -> None:
    """Loading them, and setting slots, as files' are."""
    checkpoint = open_checkpoint(model_directory("demo"), "dummy")
    config = engine_config(checkpoint.config, 2, "cpu", **SMALL)
    for compiles in (True, False):
        jax.clear_caches()
        before = compilations.count
        local_engine(checkpoint, config, jax.devices()[:2], ProgramStore(tmp_path)).prime()
        assert (compilations.count > before) == compiles


def test_a_compiler_that_fails_says_why(tmp_path: Path) -> None:
    config = engine_config(open_checkpoint(model_directory("demo")).config, 1, "cpu", **SMALL)
    spec = Spec(str(model_directory("demo")), "auto", config, str(tmp_path))
    made = spec.executables()
    from moe_jax.warmup import compile_all

    with pytest.raises(RuntimeError, match="programs are not done; the end of the log"):
        import time

        compile_all(spec, [replace(made.wanted(1)[0], ranks=-1)], time.monotonic() + 60, print)
