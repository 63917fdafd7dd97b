"""`moe-jax warmup`: compiles what a cluster needs to start, and to go on after losses, before either happens.

No cluster has to be up, and any machine with a device of that kind will do: programs depend on the model, the engine's
options, JAX and its flags, and on how many ranks form the mesh, not on which. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from serving.command import Failure, bad_input
from serving.model_options import add_model_options, llm_options

_TIMEOUT = 24 * 3600.0  # seconds


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    group = parser.add_argument_group("what is compiled")
    group.add_argument("--lose", type=int, default=2, metavar="K", help="meshes that losing up to K hosts leaves, too")
    group.add_argument("--grow", type=int, default=0, metavar="K", help="meshes of up to K hosts more, too")
    group.add_argument("--cache", type=Path, metavar="DIR", help="where (default: $MOE_JAX_CACHE or ~/.cache/moe-jax)")
    group.add_argument("--platform", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    group = parser.add_argument_group("how")
    group.add_argument("--jobs", type=int, metavar="N", help="processes (default: what cores and free memory allow)")
    group.add_argument("--check", action="store_true", help="compile nothing; exit code 1 if something is missing")
    group.add_argument("--prune", action="store_true", help="remove what no configuration warmed up here needs")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """1 when --check finds something missing."""
    try:
        with bad_input():
            return _warm_up(args, llm_options(args))
    except RuntimeError as error:
        raise Failure(str(error)) from error


def _warm_up(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """options: of the model, as `LLM` takes them.

    Raises ValueError for what cannot be served, RuntimeError for a compiler that fails, OSError for a directory that
    cannot be used.
    """
    from moe_jax.config import EngineConfig
    from moe_jax.llm import model_directory
    from moe_jax.warmup import Spec, compile_all, describe, device_kind, look
    from serving.cluster import make_cluster, sizes_after
    from serving.environment import compilation_cache, engine_environment, guess_platform, host_labels

    if args.lose < 0 or args.grow < 0 or (args.jobs is not None and args.jobs < 1):
        raise ValueError(f"found --lose {args.lose} --grow {args.grow} --jobs {args.jobs}, expected none negative")
    if args.lose >= args.hosts:
        raise ValueError(f"--lose: found {args.lose}, expected at most {args.hosts - 1}, all hosts but one")
    platform = args.platform or guess_platform(os.environ.get("JAX_PLATFORMS"))
    environ = engine_environment(0, platform, os.environ)
    os.environ["XLA_FLAGS"] = environ["XLA_FLAGS"]  # a part of the keys
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process needs no device
    cache = compilation_cache(platform, args.cache, os.environ)
    options = {name: value for name, value in options.items() if name != "hosts"}
    each, load_format = options.pop("ranks_per_host", 1), options.pop("load_format", "auto")
    hosts = host_labels(args.hosts, each)
    path = model_directory(options.pop("model"))
    cluster, _, _ = make_cluster(path, hosts, platform, load_format, cache, 1.0, **options)
    spec = Spec(cluster.start["path"], load_format, EngineConfig(**cluster.start["config"]), str(cache))
    kind = "cpu" if platform == "cpu" else device_kind(environ)
    executables = spec.executables(kind)
    sizes = [size for lost in range(args.lose + 1) for size in sorted(sizes_after(hosts, lost), reverse=True)]
    sizes += [len(hosts) + each * more for more in range(1, args.grow + 1)]

    found = look(executables, sizes)
    to_do = [entry.program for entry in found if entry.state != "present"]
    damaged = [describe(entry.program) for entry in found if entry.state == "damaged"]
    for program in damaged:
        _say(f"damaged: {_name(program)}" + ("" if args.check else "; it is compiled again"))
    done: dict[str, dict[str, Any]] = {}
    pruned: list[tuple[str, int]] = []
    if not args.check:
        store = executables.store
        store.need(executables.configuration, [key for e in found for key in e.keys if e.program is not None])
        progress = _Progress(len(to_do))

        def report(entry: dict[str, Any]) -> None:
            progress.report(entry)
            done[_name(entry)] = entry

        compile_all(spec, to_do, time.monotonic() + _TIMEOUT, report, environ, args.jobs)
        pruned = store.prune() if args.prune else []
    entries = [
        done.get(_name(describe(e.program)), e.as_dict() | {"seconds": 0.0, "cached": True})
        for e in found
        if e.state == "present" or not args.check
    ]
    missing = [describe(program) for program in to_do] if args.check else []
    if args.json:
        summary = {"entries": entries, "missing": missing, "damaged": damaged, "pruned": len(pruned)}
        print(json.dumps(summary | {"cache_dir": str(cache), "device": kind}))
    else:
        for program in missing:
            print(f"missing: {_name(program)}")
        size, seconds = sum(e["bytes"] for e in entries), sum(e["seconds"] for e in entries)
        print(
            f"{len(entries)} programs for {kind}, {size / 1e6:.1f} MB, {len(done)} compiled in {seconds:.1f} s of "
            f"compilers' time, {len(missing)} missing"
            + (f", {len(pruned)} pruned ({sum(s for _, s in pruned) / 1e6:.1f} MB)" if args.prune else "")
            + f": {cache}"
        )
    return 1 if missing else 0


def _name(program: dict[str, Any]) -> str:
    bucket = program["bucket"]
    if bucket is None:
        return "loading of parameters"
    kind = "score" if bucket["score"] else "prefill" if bucket["prefill"] else "decode"
    if program["step"] == "connect":
        return f"communicator, {program['mesh']} ranks"
    mesh = "1 rank" if program["mesh"] == 1 else f"{program['mesh']} ranks"
    return f"{program['step']} of {kind}, {bucket['rows']} rows, {mesh}"


class _Progress:
    """A line on stderr for each program that is compiled."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._begun = total, 0, time.monotonic()

    def report(self, entry: dict[str, Any]) -> None:
        self._done += 1
        spent = time.monotonic() - self._begun
        left = spent / self._done * (self._total - self._done)
        took = f"{entry['seconds']:.1f} s, {entry['bytes'] / 1e6:.2f} MB"
        _say(f"{self._done}/{self._total} {_name(entry)}: {took}; {spent:.0f} s so far, about {left:.0f} s left")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
