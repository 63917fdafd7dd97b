"""Paged decode attention on this GPU, grouped-query and latent, against JAX's own `paged_attention`.

    python scripts/bench_attention.py [--batch 64 128 256] [--context 1024 4096 32768]

bfloat16, pages of 64 in random order, merging of parts included. TB/s count keys and values once, TFLOP/s the products;
both beside the card's ceilings, measured first. JAX's own (Triton, grouped-query only) is given its best of a few
settings, and its own layout of pages. Everything is compiled before anything is measured.
"""

import argparse
import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu import ceilings, compile_all, normal, program, seconds

from moe_jax.kernels.paged_attention import PAGE, Queries, choose_splits, merge, paged_attention

SETTINGS = [(pages, splits) for pages in (1, 2) for splits in (4, 8, 16)]  # of JAX's own
MEMORY = 60e9  # bytes that keys and values may take


@dataclass(frozen=True)
class Kind:
    """A model's attention: query heads are `rows` for each of its kv heads; latent values are the keys' beginning."""

    name: str
    kv_heads: int
    rows: int
    key_dim: int
    value_dim: int
    latent: bool


KINDS = (Kind("GQA 32/4 x 128", 4, 8, 128, 128, False), Kind("MLA 128 x 576", 1, 128, 576, 512, True))


@dataclass(frozen=True)
class Case:
    """A batch of requests that have one token each after contexts of equal length."""

    kind: Kind
    batch: int
    context: int

    @property
    def pages(self) -> int:
        return self.batch * self.context // PAGE

    @property
    def bytes(self) -> float:
        """Of keys and values."""
        k = self.kind
        return 2.0 * self.pages * PAGE * k.kv_heads * (k.key_dim + (0 if k.latent else k.value_dim))

    @property
    def flops(self) -> float:
        k = self.kind
        return 2.0 * self.batch * k.kv_heads * k.rows * self.context * (k.key_dim + k.value_dim)

    @property
    def calls(self) -> int:
        """In a program. Queries differ, so that they are not taken for one another; short ones are many, for the host's
        sake."""
        return 2 if self.bytes > 1e9 else 12

    def queries(self) -> list[jax.Array]:
        k = self.kind
        shape = self.batch, k.kv_heads, k.rows, k.key_dim
        return [normal(2 + i, *shape, scale=k.key_dim**-0.5) for i in range(self.calls)]

    def tables(self) -> jax.Array:
        pages = np.random.default_rng(0).permutation(self.pages)
        return jnp.asarray(pages.reshape(self.batch, -1), jnp.int32)

    def ours(self) -> list[tuple[Any, ...]]:
        """Arguments of `run`."""
        k = self.kind
        keys = normal(0, 1, self.pages, k.kv_heads, k.key_dim, PAGE)
        values = None if k.latent else normal(1, 1, self.pages, k.kv_heads, PAGE, k.value_dim)
        one = jnp.arange(self.batch, dtype=jnp.int32)
        items = Queries(one, jnp.full(self.batch, self.context, jnp.int32), one, one)
        return [(q, keys, values, self.tables(), items) for q in self.queries()]

    def run(self, q: Any, keys: Any, values: Any, tables: Any, items: Any) -> jax.Array:
        k = self.kind
        splits = choose_splits(self.batch, k.kv_heads, k.rows, k.value_dim, self.context // PAGE)
        found = paged_attention(q, keys, values, None, None, jnp.int32(0), tables, items, k.value_dim, 1, splits)
        return merge(*found)[0].astype(q.dtype)

    def theirs(self) -> list[tuple[Any, ...]]:
        """Arguments of JAX's own."""
        k, v = (normal(i, self.kind.kv_heads, self.pages, PAGE, self.kind.key_dim) for i in range(2))
        lengths = jnp.full(self.batch, self.context, jnp.int32)
        return [(q.reshape(self.batch, -1, self.kind.key_dim), k, v, self.tables(), lengths) for q in self.queries()]


def jobs_of(case: Case, peer: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """What compiles ours, and JAX's own for each of its settings."""
    jobs = {"ours": partial(program, case.run, jax.eval_shape(case.ours))}
    if not case.kind.latent:
        shapes = jax.eval_shape(case.theirs)
        for pages, splits in SETTINGS:
            f = partial(peer, pages_per_compute_block=pages, k_splits=splits)
            jobs[f"jax at {pages}, {splits}"] = partial(program, f, shapes)
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 32768])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    peer = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention").paged_attention
    cases = [Case(k, b, c) for k in KINDS for b in args.batch for c in args.context]
    cases = [case for case in cases if case.bytes < MEMORY]
    begun = time.perf_counter()
    jobs = [jobs_of(case, peer) for case in cases]
    programs = iter(compile_all([job for each in jobs for job in each.values()], threads=16))
    built = [{name: next(programs) for name in each} for each in jobs]
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    flops, bandwidth = ceilings()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: cuBLAS {flops / 1e12:.0f} TFLOP/s, ", end="")
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    for case, compiled in zip(cases, built, strict=True):
        at = f"{case.kind.name}, batch {case.batch}, context {case.context}"

        def show(name: str, t: float, case: Case = case, at: str = at) -> None:
            print(
                f"{at:40s} {name:16s} {t * 1e6:8.1f} us {case.bytes / t / 1e12:5.2f} TB/s "
                f"({case.bytes / t / bandwidth:4.0%}) {case.flops / t / 1e12:4.0f} TFLOP/s "
                f"({case.flops / t / flops:4.0%})",
                flush=True,
            )

        mine = compiled.pop("ours")
        if isinstance(mine, Exception):
            raise mine
        show("ours", seconds(mine, case.ours()))
        if not compiled:
            continue
        arguments = case.theirs()
        times = {name: seconds(p, arguments) for name, p in compiled.items() if not isinstance(p, Exception)}
        if times:
            best = min(times, key=lambda name: times[name])
            show(best, times[best])
        else:
            print(at, "jax:", str(next(iter(compiled.values())))[:150])


if __name__ == "__main__":
    main()
