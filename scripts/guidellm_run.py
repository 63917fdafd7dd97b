"""guidellm's benchmark through the gateway smg in front of a cluster, which loses a host in the middle of it.

    python3 -m venv .venv-guidellm && .venv-guidellm/bin/pip install guidellm     # its pins conflict with ours
    pip install 'moe-jax[openai]'
    python scripts/guidellm_run.py --guidellm .venv-guidellm/bin/guidellm [--hosts 2 --requests 60]

Starts `moe-jax serve --openai-port`, and ends it. Each request asks for the same number of tokens. Prints one JSON
object; exit code 1 unless all requests were answered in full and the host was lost and came back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _cluster import is_whole
from _service import free_port, kill_a_host, served, status

from moe_jax.llm import model_directory

_TOKENS = 128  # of each output


def command(program: str, port: int, report: Path, streams: int, requests: int) -> list[str]:
    model = model_directory("demo")
    given = {
        "backend": f"kind=openai_http,target=http://127.0.0.1:{port},model={model.name},request_format=/v1/completions",
        "profile": f"kind=concurrent,streams={streams}",
        "constraint": f"kind=max_requests,count={requests}",
        "tokenizer": f"kind=hf_auto,model={model}",
        "data": f"kind=synthetic_text,prompt_tokens=32,output_tokens={_TOKENS}",
        "output": f"kind=json,path={report}",
    }
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [program, "run", *options, "--disable-console"]


def kill_in_the_middle(address: str, tokens: int, done: threading.Event) -> None:
    """Once so many tokens have been sent."""
    while not done.wait(0.05):
        if status(address)["requests"]["tokens"] >= tokens:
            kill_a_host(address)
            return


def until_whole(address: str) -> dict[str, Any]:
    """The status, at the latest after a minute."""
    deadline = time.monotonic() + 60
    while not is_whole(found := status(address)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", default="guidellm", help="the program")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=60)
    args = parser.parse_args()
    port, done = free_port(), threading.Event()
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with (
        tempfile.TemporaryDirectory() as directory,
        served("--hosts", str(args.hosts), "--openai-port", str(port)) as address,
    ):
        report = Path(directory) / "report.json"
        killing = threading.Thread(target=kill_in_the_middle, args=(address, args.requests * _TOKENS // 2, done))
        killing.start()
        ran = subprocess.run(
            command(args.guidellm, port, report, args.streams, args.requests),
            env={**os.environ, **offline},
            stdout=sys.stderr,
        )
        done.set()
        killing.join()
        after = until_whole(address)
        found = json.loads(report.read_text())["benchmarks"][0]["metrics"] if report.exists() else None
    if found is None:
        print(f"guidellm: no report, exit code {ran.returncode}", file=sys.stderr)
        return 1
    answers, tokens = found["request_totals"], found["output_token_count"]["successful"]
    losses = [change for change in after["recoveries"] if change["lost"]]
    print(
        json.dumps(
            {
                "requests": answers,
                "tokens": {name: tokens[name] for name in ("min", "max", "total_sum")},
                "tokens_per_second": round(found["output_tokens_per_second"]["successful"]["mean"], 1),
                "first_token_ms": round(found["time_to_first_token_ms"]["successful"]["median"], 1),
                "inter_token_ms": round(found["inter_token_latency_ms"]["successful"]["median"], 2),
                "lost": [change["lost"] for change in losses],
                "pause_ms": [change["pause_ms"] for change in losses],
                "whole_again": is_whole(after),
            }
        )
    )
    answered = answers["successful"] == args.requests and tokens["min"] == tokens["max"] == _TOKENS
    return 0 if answered and len(losses) == 1 and is_whole(after) else 1


if __name__ == "__main__":
    sys.exit(main())
