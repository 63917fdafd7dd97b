"""The command line: options, exit codes, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import serving.cli
from serving.cli import main

ROOT = Path(serving.cli.__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "moe_jax"))

from test_batch import ToyLLM, simple  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*simple(10), {"prompt": 1}]))
    return ["generate", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]


def test_generate_json(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--json", "--seed", "1"], llm_factory=ToyLLM) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["requests"] == 11 and summary["errors"] == 1 and summary["skipped"] == 0
    assert summary["completion_tokens"] > 0 and summary["prompt_tokens"] > 0 and summary["seconds"] >= 0
    assert summary["output"] == str(tmp_path / "out.jsonl") and summary["tokens_per_second"] > 0
    assert main(files, llm_factory=ToyLLM) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "11 requests (11 from an earlier run, 1 errors), 0 tokens" in captured.err


def test_options_reach_the_model_and_the_requests(files: list[str], tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []
    made: list[ToyLLM] = []

    def factory(**options: Any) -> ToyLLM:
        given.append(options)
        made.append(ToyLLM())
        return made[-1]

    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    options = "--model m --hosts 4 --slots 8 --replication 2 --ranks-per-host 2 --dtype float32 --max-model-len 99"
    options += " --load-format dummy --kernels reference --max-batch 3 --page-size 16 --num-pages 5"
    options += " --max-tokens 40 --temperature 0 --top-p 0.5 --top-k 3 --stop ZZ --stop YY --ignore-eos"
    assert main([*files, *options.split()], llm_factory=factory) == 0
    expected = dict(hosts=4, slots=8, replication=2, ranks_per_host=2, max_batch=3, page_size=16, num_pages=5)
    strings = dict(model="m", dtype="float32", load_format="dummy", kernels="reference")
    assert given == [{**expected, **strings, "max_model_len": 99}] and made[0].closed
    choice = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]["choices"][0]
    assert len(choice["token_ids"]) == 40
    (tmp_path / "out.jsonl").unlink()
    assert main(files, llm_factory=factory) == 0
    assert given[1] == {"model": "demo", "hosts": 1}


def broken_model(**options: Any) -> ToyLLM:
    raise ValueError("m/config.json: unknown\nmodel_type")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input", "nowhere.jsonl"], "moe-jax generate: nowhere.jsonl: no such input file"),
        (["--output", "no/where/out.jsonl"], "no such directory"),
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--seed", "-1"], "--seed"),
        ([], "m/config.json: unknown model_type"),
    ],
)
def test_bad_input_is_one_line(
    files: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *change], llm_factory=broken_model) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize(
    "argv", [[], ["nope"], ["generate"], ["generate", "--nope"], ["generate", "--hosts", "0"], ["generate", "--hosts"]]
)
def test_bad_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "moe-jax" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *(command.name for command in serving.cli.COMMANDS)])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert "usage: moe-jax" in capsys.readouterr().out


def test_interrupt_and_full_disk(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Any:
        class Failing(ToyLLM):
            def poll(self, timeout: float | None) -> list:
                raise error

        return Failing

    assert main(files, llm_factory=fails(KeyboardInterrupt())) == 130
    assert main(files, llm_factory=fails(OSError(28, "No space left on device"))) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_progress_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_jax.batch import Counts

    lines = serving.cli._Lines(every=5.0)
    clock = [0.0]
    monkeypatch.setattr(serving.cli.time, "monotonic", lambda: clock[0])
    lines.last = 0.0
    for second in range(12):
        clock[0] = second
        lines.update(Counts(total=100, requests=second, errors=1, completion_tokens=50, started=-1.0))
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("5/100 requests, ") and "tokens/s, ETA 0:01:54, 1 errors" in printed[0]


def test_processes_start_fast_and_agree(tmp_path: Path) -> None:
    """`python -m serving.cli generate` and scripts/generate.py are the same, and neither loads JAX for --help."""
    outputs, seconds = set(), []
    for command in ["-m serving.cli generate --help", "scripts/generate.py --help"] * 2:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert min(seconds) < 0.3
    check = "import sys, serving.cli; serving.cli.main(['--help']); assert not {'jax', 'moe_jax'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True).returncode == 0
