"""Paged decode attention on this GPU, grouped-query and latent, against JAX's own `paged_attention`.

    python scripts/bench_attention.py [--batch 64 128 256] [--context 1024 4096 32768]

bfloat16, pages of 64 in random order, merging of parts included. TB/s count keys and values once, TFLOP/s the products;
both beside the card's ceilings, measured first. JAX's own (Triton, grouped-query only) is given its best of a few
settings, and its own layout of pages.
"""

import argparse
import importlib
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu import ceilings, compile_all, normal, program, seconds

from moe_jax.kernels.paged_attention import PAGE, Queries, choose_splits, merge, paged_attention

KINDS = {"GQA 32/4 x 128": (4, 8, 128, 128, False), "MLA 128 x 576": (1, 128, 576, 512, True)}
SETTINGS = [(pages, splits) for pages in (1, 2) for splits in (4, 8, 16)]  # of JAX's own
MEMORY = 60e9  # bytes that keys and values may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 32768])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    flops, bandwidth = ceilings()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: cuBLAS {flops / 1e12:.0f} TFLOP/s, ", end="")
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    theirs = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention").paged_attention
    for kind, (kv_heads, rows, key_dim, value_dim, latent) in KINDS.items():
        for batch in args.batch:
            for context in args.context:
                pages = batch * context // PAGE
                moved = 2.0 * pages * PAGE * kv_heads * (key_dim + (0 if latent else value_dim))
                if moved > MEMORY:
                    continue
                work = 2.0 * batch * kv_heads * rows * context * (key_dim + value_dim)
                tables = np.random.default_rng(0).permutation(pages).reshape(batch, -1).astype(np.int32)

                def show(name: str, t: float, moved: float = moved, work: float = work, at: str = "") -> None:
                    print(
                        f"{at:38s} {name:22s} {t * 1e6:8.1f} us {moved / t / 1e12:5.2f} TB/s "
                        f"({moved / t / bandwidth:4.0%}) {work / t / 1e12:4.0f} TFLOP/s ({work / t / flops:4.0%})",
                        flush=True,
                    )

                at = f"{kind}, batch {batch}, context {context}"
                keys = normal(0, 1, pages, kv_heads, key_dim, PAGE)
                values = None if latent else normal(1, 1, pages, kv_heads, PAGE, value_dim)
                one = jnp.arange(batch, dtype=jnp.int32)
                items = Queries(one, jnp.full(batch, context, jnp.int32), one, one)
                splits = choose_splits(batch, kv_heads, rows, value_dim, context // PAGE)

                def ours(
                    q: Any, k: Any, v: Any, t: Any, items: Any, value_dim: int = value_dim, splits: int = splits
                ) -> Any:
                    found = paged_attention(q, k, v, None, None, jnp.int32(0), t, items, value_dim, 1, splits)
                    return merge(*found)[0].astype(q.dtype)

                # Queries differ, so that calls are not taken for one another; short ones are many, for the host's sake.
                qs = [
                    normal(2 + i, batch, kv_heads, rows, key_dim, scale=key_dim**-0.5)
                    for i in range(2 if moved > 1e9 else 12)
                ]
                arguments = [(q, keys, values, tables, items) for q in qs]
                show("ours", seconds(program(ours, arguments), arguments), at=at)
                del keys, values, arguments
                if latent:
                    continue
                k, v = (normal(i, kv_heads, pages, PAGE, key_dim) for i in range(2))
                lengths = np.full(batch, context, np.int32)
                bare = [(q.reshape(batch, -1, key_dim), k, v, tables, lengths) for q in qs]
                options = [dict(pages_per_compute_block=p, k_splits=s) for p, s in SETTINGS]
                built = compile_all([partial(program, partial(theirs, **o), bare) for o in options])
                times = [(seconds(b, bare), str(s)) for b, s in zip(built, SETTINGS) if not isinstance(b, Exception)]  # noqa: B905
                if times:
                    show(f"jax, best at {min(times)[1]}", min(times)[0], at=at)
                else:
                    print(at, "jax:", str(built[0])[:150])


if __name__ == "__main__":
    main()
