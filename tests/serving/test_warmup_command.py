"""`moe-jax warmup`: what it wants, what it finds, what it makes anew, and what it removes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_jax import programs, warmup
from moe_jax.checkpoint import open_checkpoint
from moe_jax.executables import Executables
from moe_jax.llm import model_directory
from moe_jax.programs import ProgramStore
from serving.cli import main

SMALL = ["warmup", "--platform", "cpu", "--max-batch", "16", "--max-model-len", "512", "--num-pages", "64"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was compiled: a stand-in writes the key where the program would be."""
    done: list[dict[str, Any]] = []

    def compile_all(spec: Any, wanted: Any, deadline: float, report: Any, *others: Any) -> None:
        executables = spec.executables()
        for program in wanted:
            key = "small" if program is None else executables.key(program)
            executables.store.put(key, key.encode())
            if program is None:
                executables.store.need(executables.loading, [key])
            done.append(warmup.describe(program))
            report(done[-1] | {"bytes": len(key), "seconds": 0.1, "cached": False})

    monkeypatch.setattr(warmup, "compile_all", compile_all)
    return done


def run(capsys: pytest.CaptureFixture[str], cache: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main([*SMALL, "--cache", str(cache), "--json", *arguments]) == code
    return json.loads(capsys.readouterr().out)


def test_every_step_of_every_mesh(compiled: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, tmp_path, "--hosts", "4", "--lose", "2", "--grow", "1")
    meshes = {(e["step"], e["mesh"]) for e in found["entries"]}
    assert meshes == {("step", 2), ("step", 3), ("step", 4), ("step", 5), ("write", 1), ("load", 1)}
    steps = [json.dumps(e["bucket"], sort_keys=True) for e in found["entries"] if e["step"] == "step"]
    assert len(steps) == 4 * len(set(steps)) and found["missing"] == []
    assert [e["mesh"] for e in compiled if e["step"] == "step"][0] == 4, "the mesh it starts with comes first"
    assert not any(e["cached"] for e in found["entries"])
    compiled.clear()
    again = run(capsys, tmp_path, "--hosts", "4", "--lose", "2", "--grow", "1")
    assert not compiled and all(e["cached"] for e in again["entries"])
    assert [e["bytes"] for e in again["entries"]] == [e["bytes"] for e in found["entries"]]


def test_hosts_of_several_ranks(compiled: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, tmp_path, "--hosts", "3", "--ranks-per-host", "2", "--lose", "1")
    assert {e["mesh"] for e in found["entries"] if e["step"] == "step"} == {6, 4}


def test_check(compiled: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--hosts", "2", "--lose", "0")
    found = run(capsys, tmp_path, *arguments, "--check", code=1)
    assert not compiled and found["entries"] == [] and len(found["missing"]) > 3
    run(capsys, tmp_path, *arguments)
    compiled.clear()
    assert run(capsys, tmp_path, *arguments, "--check")["missing"] == []
    first, second, *_ = sorted(tmp_path.rglob("*.program"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert main([*SMALL, "--cache", str(tmp_path), *arguments, "--check"]) == 1
    said = capsys.readouterr()
    named = [line for line in said.out.splitlines() if line.startswith("missing: ")]
    assert len(named) == 2 and said.err.count("damaged: ") == 1 and not compiled
    found = run(capsys, tmp_path, *arguments)
    assert len(compiled) == 2 and len(found["damaged"]) == 1
    assert run(capsys, tmp_path, *arguments, "--check")["damaged"] == []


def test_prune(compiled: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, tmp_path, "--hosts", "3", "--lose", "2")
    run(capsys, tmp_path, "--hosts", "2", "--lose", "0", "--dtype", "bfloat16")
    directory = next(tmp_path.rglob("*.program")).parent
    (directory / f"{'0' * 40}.program").write_bytes(b"of an older version")
    before = len(list(directory.glob("*.program")))
    assert run(capsys, tmp_path, "--hosts", "3", "--lose", "2", "--prune")["pruned"] == 1
    # The configuration needs less now: what only its smallest mesh needed goes, what the other needs stays.
    found = run(capsys, tmp_path, "--hosts", "3", "--lose", "1", "--prune")
    assert found["pruned"] > 1 and len(list(directory.glob("*.program"))) == before - 1 - found["pruned"]
    assert run(capsys, tmp_path, "--hosts", "2", "--lose", "0", "--dtype", "bfloat16", "--check")["missing"] == []


def test_copied_elsewhere(
    compiled: list, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another path, of the cache and of the model, another host name and port, and whatever else changes."""
    run(capsys, tmp_path / "here", "--hosts", "2", "--lose", "1")
    compiled.clear()
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "copy")
    shutil.copytree(model_directory("demo"), tmp_path / "model")
    for name, value in (("HOSTNAME", "another"), ("JAX_COORDINATOR_ADDRESS", "10.1.1.1:99"), ("NODE", "7")):
        monkeypatch.setenv(name, value)
    arguments = ("--hosts", "2", "--lose", "1", "--model", str(tmp_path / "model"))
    assert run(capsys, tmp_path / "there" / "copy", *arguments, "--check")["missing"] == []
    assert run(capsys, tmp_path / "there" / "copy", *arguments, "--max-batch", "32", "--check", code=1)["missing"]


def test_flags_of_another_device_are_no_part_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
    gpu, cpu = programs.key("NVIDIA H200"), programs.key("cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2 --xla_cpu_multi_thread_eigen=false")
    assert programs.key("NVIDIA H200") == gpu and programs.key("cpu") == cpu
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    assert programs.key("NVIDIA H200") != gpu and programs.key("cpu") == cpu


@pytest.mark.parametrize("arguments", [["--hosts", "2", "--lose", "2"], ["--hosts", "2", "--lose", "-1"]])
def test_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert "--lose" in capsys.readouterr().err


def test_how_many_processes_made_it_does_not_matter(tmp_path: Path) -> None:
    """The loading programs compiled in a process with three devices serve one with four, and no second one is made."""
    from moe_jax.llm import engine_config

    checkpoint = open_checkpoint(model_directory("demo"))
    config = engine_config(checkpoint.config, 3, "cpu", max_batch=16, max_model_len=512, num_pages=64)
    spec = warmup.Spec(str(model_directory("demo")), "auto", config, str(tmp_path))
    program = next(p for p in spec.executables().wanted(3) if p.kind == "write")
    seen: list[dict[str, Any]] = []
    import time

    warmup.compile_all(spec, [program, None], time.monotonic() + 120, seen.append, jobs=1)
    assert [e["step"] for e in seen] == ["write", "load"] and all(e["bytes"] > 0 for e in seen)

    import jax
    import numpy as np

    from moe_jax.engine import Engine
    from moe_jax.executables import compilations
    from moe_jax.placement import plan

    hosts = ["a", "b", "c"]
    model = checkpoint.config
    slots = plan(model.num_moe_layers, model.num_experts, hosts, config.slots_for(model.num_experts), 1)
    made = Executables.of(checkpoint, config, "cpu", ProgramStore(tmp_path))
    before = compilations.count
    engine = Engine(checkpoint, config, [jax.devices()[2]], slots[:, 1:2], made)
    engine.prime()
    made.load(program, [jax.devices()[2]])
    assert compilations.count == before
    assert np.asarray(engine.params[0]["embed"]).any()
