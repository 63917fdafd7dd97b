"""The compiled programs of a mesh: for each bucket a step, and the write that follows it.

The step holds all collectives and donates nothing; the write holds none and donates the cache. A step that fails
because a host died therefore leaves every buffer as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import attention
from moe_jax.batch_input import Layout, pack_output
from moe_jax.config import Bucket, EngineConfig, ModelConfig
from moe_jax.mesh import REPLICATED, SHARDED, STACKED, ExpertMesh, param_specs
from moe_jax.model import Run, forward, logits
from moe_jax.moe import AXIS, Dispatch
from moe_jax.sampling import log_softmax, sample


class CompileCounter:
    """Counts XLA compilations of this process, whoever asks for them. `count` only ever grows."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


compilations = CompileCounter()


@dataclass(frozen=True)
class Executables:
    """Programs for one mesh, compiled when they are first called; `Engine.warm_up` calls each of them."""

    model: ModelConfig
    engine: EngineConfig
    mesh: ExpertMesh
    _steps: dict[Bucket, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _writes: dict[Bucket, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def run(self, bucket: Bucket) -> Run:
        e = self.engine
        return Run(
            self.model,
            Dispatch(self.mesh.size),
            jnp.dtype(e.dtype),
            e.row_tile,
            e.expert_tile,
            bucket.prefill,
            e.deterministic,
            e.kernels == "reference",
        )

    def step(self, bucket: Bucket) -> Callable[..., Any]:
        """(params, table, cache, batch [ranks, size]) -> (output [ranks, words], new K/V rows, logits or None)."""
        if bucket not in self._steps:
            self._steps[bucket] = self._build(bucket)
        return self._steps[bucket]

    def _build(self, bucket: Bucket) -> Callable[..., Any]:
        run, layout, engine = self.run(bucket), Layout(bucket, self.engine), self.engine

        @jax.jit
        @partial(
            jax.shard_map,
            mesh=self.mesh.mesh,
            in_specs=(param_specs(self.model), REPLICATED, STACKED, SHARDED),
            out_specs=(SHARDED, STACKED, SHARDED),
            check_vma=False,
        )
        def step(params: Any, table: jax.Array, cache: attention.Cache, batch: jax.Array) -> Any:
            b = layout.unpack(batch[0])
            x, new = forward(run, params, table, cache, b.token, b.position, b.entries, b.page >= 0)
            if bucket.score:
                scores = logits(run, params, x, b.entries.num_tiles * engine.row_tile)
                return self._agree(b.wish)[None], new, log_softmax(scores)[None]
            scores = logits(run, params, x[b.sample_row], b.num_sampled)
            out = pack_output(self._agree(b.wish), sample(scores, b.sampling, b.want_top))
            return out[None], new, scores[None] if engine.return_logits else None

        return step

    def _agree(self, wish: jax.Array) -> jax.Array:
        """wish [2]: the wanted level and the bells heard. All ranks get the greatest level and the fewest bells."""
        sign = jnp.array([1, -1], wish.dtype)
        return lax.pmax(wish * sign, AXIS) * sign if self.mesh.size > 1 else wish

    def write(self, bucket: Bucket) -> Callable[..., Any]:
        """(cache, new K/V rows, batch) -> cache. The cache is donated."""
        if bucket not in self._writes:
            layout = Layout(bucket, self.engine)

            @partial(jax.jit, donate_argnums=0)
            @partial(
                jax.shard_map,
                mesh=self.mesh.mesh,
                in_specs=(STACKED, STACKED, SHARDED),
                out_specs=STACKED,
                check_vma=False,
            )
            def write(cache: attention.Cache, new: attention.Cache, batch: jax.Array) -> attention.Cache:
                b = layout.unpack(batch[0])
                return attention.write(cache, new, b.position, b.page)

            self._writes[bucket] = write
        return self._writes[bucket]
