"""A whole MoE layer on this GPU, router to combine, against the sum of its two grouped GEMMs.

    python scripts/bench_moe_layer.py [--rows 512 65536]

Rows are (token, choice) pairs, 8 of a token, all of experts that this GPU holds. "bytes" is what permuting and
combining must move alone, at the speed of a copy measured first.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _gpu import ceilings, normal, program, seconds

from moe_jax.config import parse_hugging_face
from moe_jax.kernels import hopper_ffn as ffn
from moe_jax.kernels.grouped_gemm import grouped_gemm, to_blocks
from moe_jax.kernels.routing import assign_rows, cut_tiles, padded_rows, permute
from moe_jax.moe import route, router_logits, router_parts

MODELS = {"Qwen3-30B": (128, 2048, 768), "DSV3 at EP8": (32, 7168, 2048)}
CHOICES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 65536])
    args = parser.parse_args()
    _, bandwidth = ceilings()
    for name, (groups, hidden, inner) in MODELS.items():
        config = parse_hugging_face(
            dict(model_type="qwen3_moe", vocab_size=64, hidden_size=hidden, num_hidden_layers=1)
            | dict(num_attention_heads=1, num_key_value_heads=1)
            | dict(num_experts=groups, num_experts_per_tok=CHOICES, moe_intermediate_size=inner, intermediate_size=64)
        )
        gate_up = jax.jit(partial(to_blocks, swiglu=True))(normal(0, 1, groups, hidden, 2 * inner, scale=0.02))
        down = jax.jit(partial(to_blocks, swiglu=False))(normal(1, 1, groups, inner, hidden, scale=0.02))
        router, layer = router_parts(normal(2, hidden, groups, scale=0.02).astype(jnp.float32)), jnp.int32(0)

        def whole(x: jax.Array, *w: Any, config: Any = config) -> jax.Array:
            router, gate_up, down, layer = w
            ids, weights = route(config, router_logits(x, router), None)
            return ffn.hopper_ffn(x, ids, weights, gate_up, down, layer)

        for rows in args.rows:
            calls = 2 if rows > 8192 else 8
            xs = [normal(3 + i, rows // CHOICES, hidden) for i in range(calls)]
            arguments = [(x, router, gate_up, down, layer) for x in xs]
            layer_seconds = seconds(program(whole, arguments), arguments)

            first, second = ffn.configs(groups, hidden, inner, rows)

            def prepare(
                x: jax.Array, router: jax.Array, config: Any = config, rows: int = rows, each: Any = (first, second)
            ) -> Any:
                ids, _ = route(config, router_logits(x, router), None)
                place, sizes = assign_rows(ids, config.num_experts)
                tiles = [cut_tiles(sizes, rows, c.block_m) for c in each]
                return permute(x, place, padded_rows(rows, config.num_experts)), *tiles

            ready = [jax.jit(prepare)(x, router) for x in xs]
            ups = [(x, gate_up, tiles, layer) for x, tiles, _ in ready]
            up = program(partial(grouped_gemm, config=first, activate=True), ups)
            downs = [(h, down, tiles, layer) for h, (_, _, tiles) in zip(up(ups), ready, strict=True)]
            gemms = seconds(up, ups)
            gemms += seconds(program(partial(grouped_gemm, config=second), downs), downs)
            least = 2 * hidden * (2 * rows + 2 * rows // CHOICES) / bandwidth
            print(
                f"{name:12s} {rows:6d} rows: layer {layer_seconds * 1e6:8.1f} us, GEMMs {gemms * 1e6:8.1f} us, "
                f"overhead {layer_seconds / gemms - 1:5.1%}, of which bytes alone {least / gemms:5.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
