"""`moe-jax plan`: what it prints, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax import placement
from serving.cli import main

SMALL = ["plan", "--experts", "8", "--layers", "2", "--hosts", "4", "--expert-bytes", "1000"]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*SMALL, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--hosts-per-rack", "2", "--eplb", "--lose", "1", "2", "3")
    assert found["hosts"] == ["host0", "host1", "host2", "host3"] and found["replication"] == 2
    slots = np.array(found["slots"], np.int32)
    assert slots.shape == (2, 4, 4)
    primary = np.array(found["primary"])
    for layer in range(2):
        for expert, (rank, slot) in enumerate(primary[layer]):
            assert slots[layer, rank, slot] == expert
    assert found["survivable_host_losses"] == 1 and found["survivable_rack_losses"] == 0
    assert found["fatal_probability"]["1"] == 0 and found["fatal_probability"]["2"] > 0
    assert found["fatal_rack_probability"]["1"] > 0
    assert found["imbalance"]["0"] == 1 and set(found["imbalance"]) == {"0", "1", "2", "3"}
    assert found["imbalance"]["3"] is None and found["unservable"]["3"] == 1, "4 slots cannot hold 8 experts"
    assert found["repair_bytes"]["1"] == 0 and found["worst_repair_bytes"]["2"] % 1000 == 0
    assert found["rank_bytes"] == 2 * 4 * 1000 and found["seconds"] > 0
    assert found["eplb"]["survivable_host_losses"] <= 1


def test_a_plan_is_carried_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = plan(capsys, "--load", "zipf", "--slots", "6")
    (tmp_path / "before.json").write_text(json.dumps(first))
    arguments = ("--slots", "6", "--before", str(tmp_path / "before.json"))
    assert plan(capsys, "--load", "zipf", *arguments)["moved"] == {"experts": 0, "bytes": 0}
    np.save(tmp_path / "load.npy", placement.make_load("zipf", 2, 8, seed=5))
    after = plan(capsys, "--load", str(tmp_path / "load.npy"), *arguments)
    moved = placement.moves(np.array(first["slots"]), np.array(after["slots"]))
    assert 0 < moved < 48 and after["moved"] == {"experts": moved, "bytes": 1000 * moved}


def test_what_moves(capsys: pytest.CaptureFixture[str]) -> None:
    changes = plan(capsys, "--lost", "host1")["changes"]
    assert changes["loaded_bytes"] == 0 and changes["returned_bytes"] == 8000


def test_what_serves_after_every_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """Every expert has a primary on a rank that is left, in a slot with it; under the promise nothing is loaded."""
    arguments = ["--layers", "2", "--experts", "8", "--hosts", "4", "--ranks-per-host", "2", "--lose", "1", "--json"]
    assert main(["plan", *arguments, "--survivors", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["survivors"]) == 4 + 6 + 4
    for table in found["survivors"]:
        if table["primary"] is None:
            assert len(table["lost"]) == 3  # four slots are left, for eight experts
            continue
        slots = copy.deepcopy(found["slots"])
        for layer, rank, slot, expert in table["loaded"]:
            slots[layer][rank][slot] = expert
        assert len(table["lost"]) > 1 or not table["loaded"]
        for layer, primaries in enumerate(table["primary"]):
            assert [slots[layer][rank][slot] for rank, slot in primaries] == list(range(8))
            assert not {found["hosts"][rank] for rank, _ in primaries} & set(table["lost"])


def test_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", "--hosts", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert np.array(found["slots"]).shape == (5, 4, 8) and found["rank_bytes"] == 40 * found["expert_bytes"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--eplb", "--scatter", "1", "3", "--hosts-per-rack", "2", "--lost", "host0", "host1"]) == 0
    said = capsys.readouterr().out
    for words in ("scatter 1", "scatter 3", "EPLB", "racks lost instead", "are loaded before serving goes on"):
        assert words in said


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--eplb", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "1"], "hosts: found 1, expected at least replication, 2"),
        (["--slots", "1"], "slots: found 4 in all"),
        (["--lose", "4"], "--lose: found [4], expected numbers from 1 to 3"),
        (["--lost", "host9"], "--lost: found host9, expected some of host0 to host3"),
        (["--load", "none"], "--load: found 'none', expected one of equal, uniform"),
        (["--model", "demo"], "--model: found --layers, --experts or --expert-bytes too"),
        (["--before", "missing.json"], "missing.json"),
        (["--survivors", "1"], "--survivors: found no --json, expected it"),
        (["--json", "--survivors", "4"], "--survivors: found 4"),
        (["--replication", "0"], "--replication: found 0, expected at least 1"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
