"""A whole MoE layer on this GPU, router to combine, against the sum of its two grouped GEMMs.

    python scripts/bench_moe_layer.py [--rows 512 65536]

Rows are (token, choice) pairs, 8 of a token, all of experts that this GPU holds. "bytes" is what permuting and
combining must move alone, at the speed of a copy measured first. Everything is compiled before anything is measured.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _gpu import ceilings, compile_all, normal, program, seconds

from moe_jax.config import ModelConfig, parse_hugging_face
from moe_jax.kernels import hopper_ffn as ffn
from moe_jax.kernels.grouped_gemm import grouped_gemm, to_blocks
from moe_jax.kernels.routing import assign_rows, combine, cut_tiles, padded_rows, permute
from moe_jax.moe import route, router_logits, router_parts

MODELS = {"Qwen3-30B": (128, 2048, 768), "DSV3 at EP8": (32, 7168, 2048)}
CHOICES = 8


@dataclass(frozen=True)
class Layer:
    """One MoE layer at a number of rows, and the pieces of it that are measured."""

    name: str
    groups: int
    hidden: int
    inner: int
    rows: int

    @property
    def calls(self) -> int:
        return 2 if self.rows > 8192 else 8

    @property
    def model(self) -> ModelConfig:
        return parse_hugging_face(
            dict(model_type="qwen3_moe", vocab_size=64, hidden_size=self.hidden, num_hidden_layers=1)
            | dict(num_attention_heads=1, num_key_value_heads=1, num_experts=self.groups, num_experts_per_tok=CHOICES)
            | dict(moe_intermediate_size=self.inner, intermediate_size=64)
        )

    def weights(self) -> tuple[jax.Array, ...]:
        """Router, gate and up, down."""
        gate_up = normal(0, 1, self.groups, self.hidden, 2 * self.inner, scale=0.02)
        down = normal(1, 1, self.groups, self.inner, self.hidden, scale=0.02)
        router = normal(2, self.hidden, self.groups, scale=0.02).astype(jnp.float32)
        return router_parts(router), to_blocks(gate_up, True), to_blocks(down, False)

    def pieces(self) -> dict[str, Callable[..., Any]]:
        """Of what `arguments` gives; "layer" is all of it."""
        first, second = ffn.configs(self.groups, self.hidden, self.inner, self.rows)
        layer, padded = jnp.int32(0), padded_rows(self.rows, self.groups)

        def choose(x: jax.Array, router: jax.Array) -> tuple[jax.Array, jax.Array]:
            return route(self.model, router_logits(x, router), None)

        def whole(x: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
            router, gate_up, down = weights
            return ffn.hopper_ffn(x, *choose(x, router), gate_up, down, layer)

        def prepare(x: jax.Array, router: jax.Array) -> tuple[Any, ...]:
            ids, weights = choose(x, router)
            place, sizes = assign_rows(ids, self.groups)
            return (place, weights, *(cut_tiles(sizes, self.rows, c.block_m) for c in (first, second)))

        return {
            "layer": whole,
            "routing": prepare,
            "permute": lambda x, place: permute(x, place, padded),
            "up": lambda h, w, t: grouped_gemm(h, w, t, layer, first, True),
            "down": lambda h, w, t: grouped_gemm(h, w, t, layer, second),
            "combine": combine,
        }


def built(layer: Layer) -> dict[str, Callable[[], Any]]:
    """For each piece what compiles it."""
    pieces, like = layer.pieces(), partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = jax.eval_shape(layer.weights)
    x = like((layer.rows // CHOICES, layer.hidden))
    place, chosen, *tiles = jax.eval_shape(pieces["routing"], x, weights[0])
    h = like((padded_rows(layer.rows, layer.groups), layer.hidden))
    arguments = {
        "layer": (x, weights),
        "up": (h, weights[1], tiles[0]),
        "down": (like((h.shape[0], layer.inner)), weights[2], tiles[1]),
        "routing": (x, weights[0]),
        "permute": (x, place),
        "combine": (h, place, chosen),
    }
    return {name: partial(program, f, [arguments[name]] * layer.calls) for name, f in pieces.items()}


def measure(layer: Layer, weights: tuple[jax.Array, ...], compiled: dict[str, Any]) -> dict[str, float]:
    """Seconds of each piece."""
    router, gate_up, down = weights
    xs = [normal(3 + i, layer.rows // CHOICES, layer.hidden) for i in range(layer.calls)]
    arguments: dict[str, list[tuple[Any, ...]]] = {"layer": [(x, weights) for x in xs]}
    arguments["routing"] = [(x, router) for x in xs]
    chosen = compiled["routing"](arguments["routing"])
    arguments["permute"] = [(x, c[0]) for x, c in zip(xs, chosen, strict=True)]
    rows = compiled["permute"](arguments["permute"])
    arguments["up"] = [(h, gate_up, c[2]) for h, c in zip(rows, chosen, strict=True)]
    arguments["down"] = [(h, down, c[3]) for h, c in zip(compiled["up"](arguments["up"]), chosen, strict=True)]
    arguments["combine"] = [(h, *c[:2]) for h, c in zip(rows, chosen, strict=True)]
    return {name: seconds(program, arguments[name]) for name, program in compiled.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 65536])
    args = parser.parse_args()
    layers = [Layer(name, *sizes, rows) for name, sizes in MODELS.items() for rows in args.rows]
    begun = time.perf_counter()
    jobs = [built(layer) for layer in layers]
    programs = iter(compile_all([job for each in jobs for job in each.values()], threads=16))
    compiled = [{name: next(programs) for name in each} for each in jobs]
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    _, bandwidth = ceilings()
    weights: dict[str, tuple[jax.Array, ...]] = {}
    for layer, pieces in zip(layers, compiled, strict=True):
        if failed := [p for p in pieces.values() if isinstance(p, Exception)]:
            raise failed[0]
        if layer.name not in weights:
            weights.clear()
            weights[layer.name] = jax.jit(layer.weights)()
        found = measure(layer, weights[layer.name], pieces)
        gemms = found["up"] + found["down"]
        least = 2 * layer.hidden * (2 * layer.rows + 2 * layer.rows // CHOICES) / bandwidth
        alone = ", ".join(f"{name} {found[name] * 1e6:.1f}" for name in list(found)[1:])
        print(
            f"{layer.name:12s} {layer.rows:6d} rows: layer {found['layer'] * 1e6:.1f} us, GEMMs {gemms * 1e6:.1f} us, "
            f"overhead {found['layer'] / gemms - 1:5.1%}, of which bytes alone {least / gemms:5.1%} (each: {alone})",
            flush=True,
        )


if __name__ == "__main__":
    main()
