"""The compiled programs of an engine: for each bucket a step, and the write that follows it.

The step holds all collectives and donates nothing; the write holds none and donates the cache. A step that fails
because a host died therefore leaves every buffer as it was.

A program is compiled for a number of ranks, by any process that has so many devices of that kind, and then loaded for
the devices of a mesh, which takes milliseconds. Changing the mesh compiles nothing.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, SingleDeviceSharding

from moe_jax import attention, programs
from moe_jax.batch_input import Layout, pack_output
from moe_jax.checkpoint import Checkpoint, param_types, widened
from moe_jax.config import Bucket, ConfigError, EngineConfig, ModelConfig
from moe_jax.distributed import Loaded, load_program, serialize_program
from moe_jax.kernels import native
from moe_jax.kernels.expert_ffn import prepare, prepared_dtype
from moe_jax.mesh import REPLICATED, SHARDED, STACKED, ExpertMesh, param_specs
from moe_jax.model import Run, forward, logits
from moe_jax.moe import AXIS, Dispatch, count_choices
from moe_jax.params import stacked_shapes
from moe_jax.sampling import log_softmax, log_sum_exp, sample


class CompileCounter:
    """Counts XLA compilations of this process, whoever asks for them, and of each thread. Both only ever grow."""

    def __init__(self) -> None:
        self.count = 0
        self._own = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def own(self) -> int:
        """Those that the calling thread waited for: others may compile ahead meanwhile."""
        return getattr(self._own, "count", 0)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self._own.count = self.own + 1


compilations = CompileCounter()


@dataclass(frozen=True)
class Program:
    """Which program: a step for a mesh of `ranks`, a write for that many of one process, or what connects a mesh."""

    kind: Literal["step", "write", "connect"]
    bucket: Bucket
    ranks: int


@dataclass(frozen=True)
class Executables:
    """The programs of one configuration. `types` is the pytree of the parameters' dtypes. `model` has 8-bit experts
    only where kernels multiply such."""

    model: ModelConfig
    engine: EngineConfig
    types: Any
    kind: str  # of device
    store: programs.ProgramStore
    _loaded: dict[tuple[Program, tuple[int, ...]], Loaded] = field(default_factory=dict, repr=False)
    _small: dict[tuple[str, int], Loaded] = field(default_factory=dict, repr=False)  # by key and device

    @staticmethod
    def of(checkpoint: Checkpoint, engine: EngineConfig, kind: str, store: programs.ProgramStore) -> "Executables":
        """kind: of the device, "cpu" or a GPU's name, as precisely as programs depend on it."""
        checkpoint, kernels = resolve(checkpoint, engine, kind)
        platform = "cpu" if kind == "cpu" else "cuda"
        types = param_types(checkpoint, engine.dtype)
        types["segments"] = [
            {n: prepared_dtype(t, platform) if n.startswith("experts_") else t for n, t in segment.items()}
            for segment in types["segments"]
        ]
        return Executables(checkpoint.config, replace(engine, kernels=kernels), types, kind, store)

    def prepare(self, name: str, weights: jax.Array) -> jax.Array:
        """Expert weights [..., in, out] as this configuration's programs want them; donated."""
        if self.engine.kernels == "hopper":
            from moe_jax import hopper

            return hopper.prepare(name, weights, self.call)
        return prepare(weights, self.call)

    def wanted(self, ranks: int, local: int = 1) -> list[Program]:
        """What a mesh of `ranks`, `local` of them in this process, needs; most urgent first."""
        kinds: tuple[tuple[Literal["step", "write"], int], ...] = (("step", ranks), ("write", local))
        programs = [Program(kind, bucket, size) for bucket in self.engine.buckets for kind, size in kinds]
        return [*programs, self.connection(ranks)] if self.connects_ahead and ranks > 1 else programs

    @property
    def connects_ahead(self) -> bool:
        """Whether a mesh's communicator can be built before the mesh is needed. Gloo's would be cut with the others."""
        return self.kind != "cpu"

    def connection(self, ranks: int) -> Program:
        return Program("connect", self.engine.buckets[0], ranks)

    def key(self, program: Program) -> str:
        types = [str(t) for t in jax.tree.leaves(self.types)]
        kernels = native.identity() if self.engine.kernels == "native" else None
        return programs.key(self.kind, self.model, self.engine, types, program, kernels)

    @property
    def kernels_number(self) -> int:
        """Ranks with the same kernels have the same: others would give a request other bits."""
        return int(native.identity()[:7], 16) if self.engine.kernels == "native" else 0

    def missing(self, wanted: Sequence[Program]) -> list[Program]:
        """Those that are not in the store; damaged ones are removed from it."""
        return [p for p in wanted if self.store.get(self.key(p)) is None]

    def call(self, function: Any, device: jax.Device, *arguments: Any, **static: Any) -> jax.Array:
        """`function(*arguments, **static)`, jitted, with one result, on one device.

        Loading parameters takes a few dozen such functions. Their programs are kept as the steps' are, and whoever
        needs one first compiles it, so that the second start compiles nothing.
        """
        shapes = [(a.shape, a.dtype.name) for a in arguments]
        key = programs.key(self.kind, function.__module__, function.__name__, shapes, sorted(static.items()))
        if (key, device.id) not in self._small:
            raw = self.store.get(key)
            if raw is None:
                place = SingleDeviceSharding(device)
                specs = [jax.ShapeDtypeStruct(shape, jnp.dtype(t), sharding=place) for shape, t in shapes]
                raw = serialize_program(function.lower(*specs, **static), deterministic=True)
                self.store.put(key, raw)
            self._small[key, device.id] = load_program(raw, [device])
        on = {device}
        there = [a if isinstance(a, jax.Array) and a.devices() == on else jax.device_put(a, device) for a in arguments]
        return self._small[key, device.id](there)[0][0]

    def note_small(self) -> None:
        """Note in the store that the programs which `call` has used are needed."""
        if self.store.directory is not None:
            with suppress(OSError):
                self.store.need(self.loading, {key for key, _ in self._small})

    @property
    def loading(self) -> str:
        """The configuration under which `note_small` notes them."""
        return programs.key(self.kind, "loading", self.configuration)

    @property
    def configuration(self) -> str:
        """What decides the keys, but for the versions of JAX and of this package."""
        return repr((self.model, self.engine, [str(t) for t in jax.tree.leaves(self.types)], self.kind))

    def load(self, program: Program, devices: Sequence[jax.Device]) -> Loaded:
        """The program for these devices; compiled here if it is nowhere at hand."""
        at = program, tuple(d.id for d in devices)
        loaded = self._loaded.get(at)
        if loaded is None:
            raw = self.store.get(self.key(program)) or self.compile(program, devices)
            # If two threads load it at once both have the same in the end: that one has its code on the device.
            loaded = self._loaded.setdefault(at, load_program(raw, devices))
        return loaded

    def load_all(self, wanted: Sequence[tuple[Program, Sequence[jax.Device]]]) -> None:
        """Load programs side by side: compiling them one after the other takes minutes for a GPU."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda each: self.load(*each), wanted))

    def keep_only(self, *meshes: Sequence[jax.Device]) -> None:
        """Forget what was loaded for other meshes."""
        ids = {tuple(d.id for d in mesh) for mesh in meshes}
        for at in list(self._loaded):  # other threads may load or forget some meanwhile
            if at[1] not in ids:
                self._loaded.pop(at, None)

    def compile(self, program: Program, devices: Sequence[jax.Device]) -> bytes:
        """Compile for any `program.ranks` devices, and keep it."""
        mesh = ExpertMesh(tuple(devices))
        assert mesh.size == program.ranks, (program, devices)
        build = {"step": self.step, "write": self.write, "connect": self.connect}[program.kind]
        lowered = build(program.bucket, mesh).lower(*self.arguments(program, mesh))
        options = None
        if self.engine.kernels == "hopper":
            from moe_jax.hopper import OPTIONS as options
        raw = serialize_program(lowered, self.engine.deterministic, options)
        self.store.put(self.key(program), raw)
        return raw

    def arguments(self, program: Program, mesh: ExpertMesh) -> tuple[Any, ...]:
        """Shapes, dtypes and shardings of a program's arguments."""
        model, engine, bucket = self.model, self.engine, program.bucket

        def spec(shape: tuple[int, ...], dtype: Any, p: Any) -> jax.ShapeDtypeStruct:
            shape = mesh.global_shape(shape, p)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh.mesh, p))

        cache = {n: spec(s, engine.dtype, STACKED) for n, s in attention.cache_shapes(model, engine).items()}
        batch = spec((1, Layout(bucket, engine).size), np.int32, SHARDED)
        last = spec((1, engine.max_batch), np.int32, SHARDED)
        if program.kind == "connect":
            return (spec((1,), np.int32, SHARDED),)
        if program.kind == "write":
            new = {n: spec(s, engine.dtype, STACKED) for n, s in attention.new_shapes(model, bucket.rows).items()}
            layers = model.num_moe_layers
            counts = spec((layers, 1, model.num_experts), np.int32, STACKED)
            return cache, counts, new, spec((layers, bucket.rows, model.top_k), np.int32, STACKED), batch
        shapes = jax.tree.map(lambda s: s[1], stacked_shapes(model, engine.slots_for(model.num_experts)), is_leaf=_pair)
        if self.engine.kernels == "hopper":
            from moe_jax.hopper import prepared_shape

            for s in shapes["segments"]:
                s |= {name: prepared_shape(name, s[name]) for name in s if name.startswith("experts_")}
        params = jax.tree.map(
            lambda shape, t, p: spec(shape, t, p), shapes, self.types, param_specs(model), is_leaf=_shape
        )
        table = (model.num_moe_layers, model.num_experts, engine.max_replicas)
        return params, spec(table, np.int32, REPLICATED), cache, last, batch

    def run(self, bucket: Bucket, ranks: int) -> Run:
        e = self.engine
        return Run(
            self.model,
            Dispatch(ranks),
            jnp.dtype(e.dtype),
            e.row_tile,
            e.expert_tile,
            bucket.prefill,
            e.deterministic,
            e.kernels,
            straight=self.kind != "cpu",
        )

    def step(self, bucket: Bucket, mesh: ExpertMesh) -> Any:
        """(params, table, cache, last [ranks, max_batch], batch [ranks, size]) -> (output [ranks, words], sampled
        tokens [ranks, max_batch], new K/V rows, the experts that they chose, logits or None). last: what the step
        before sampled."""
        run, layout, engine = self.run(bucket, mesh.size), Layout(bucket, self.engine), self.engine

        def agree(wish: jax.Array, after: jax.Array) -> jax.Array:
            """wish [4]: the wanted level, the bells heard, the epoch known, and the proof. All get the greatest level
            and the least of the others, what every rank has heard of; level -1 if ranks run different kernels.

            This is the step's last collective, behind whatever `after` comes from. NCCL's, when it is aborted, leaves
            what was in its buffers and says nothing: so each rank puts the same number, another one in every step, in
            a place of its own, and only a reduction that took place brings all of them."""
            if mesh.size == 1:
                return wish
            sign = jnp.array([1, -1, -1], wish.dtype)
            proofs = jnp.where(jnp.arange(mesh.size) == lax.axis_index(AXIS), wish[3], 0)
            kernels = jnp.array([self.kernels_number, -self.kernels_number], wish.dtype)
            mine, _ = lax.optimization_barrier((jnp.concatenate([wish[:3] * sign, kernels, proofs]), after))
            all_of_us = lax.pmax(mine, AXIS)
            agreed = all_of_us[:3] * sign
            agreed = agreed.at[0].set(jnp.where(all_of_us[3] == -all_of_us[4], agreed[0], -1))
            return jnp.append(agreed, all_of_us[5:].min())

        @partial(jax.jit, keep_unused=True)
        @partial(
            jax.shard_map,
            mesh=mesh.mesh,
            in_specs=(param_specs(self.model), REPLICATED, STACKED, SHARDED, SHARDED),
            out_specs=(SHARDED, SHARDED, STACKED, STACKED, SHARDED),
            check_vma=False,
        )
        def step(params: Any, table: jax.Array, cache: attention.Cache, last: jax.Array, batch: jax.Array) -> Any:
            b = layout.unpack(batch[0])
            token = jnp.where(b.token < 0, last[0, jnp.maximum(-1 - b.token, 0)], b.token)
            x, new, chosen = forward(run, params, table, cache, token, b.position, b.entries, b.page >= 0)
            if bucket.score:
                scores = logits(run, params, x, b.entries.num_tiles * engine.row_tile)
                scores = log_softmax(scores) if run.ordered else jax.nn.log_softmax(scores)
                return agree(b.wish, x)[None], last, new, chosen, scores[None]
            scores = logits(run, params, x[b.sample_row], b.num_sampled)
            if run.ordered or run.kernels == "reference":
                reduce = partial(native.log_sum_exp, rows=b.num_sampled) if run.kernels == "native" else log_sum_exp
                sampled = sample(scores, b.sampling, b.want_top, reduce, run.straight)
            else:
                from moe_jax.kernels.sampling import sample as sample_fast  # Pallas takes its time to import

                sampled = sample_fast(scores, b.sampling, b.want_top)
            tokens = jnp.pad(sampled.token, (0, engine.max_batch - len(sampled.token)))
            out = pack_output(agree(b.wish, x), sampled)
            return out[None], tokens[None], new, chosen, scores[None] if engine.return_logits else None

        return step

    def write(self, bucket: Bucket, mesh: ExpertMesh) -> Any:
        """(cache, counts [layers, ranks, experts], new K/V rows, chosen experts, batch) -> (cache, counts). What is
        written to is donated."""
        layout, put = Layout(bucket, self.engine), {"native": native.write}.get(self.engine.kernels, attention.write)
        if self.engine.kernels == "hopper":
            from moe_jax import hopper

            put = hopper.write

        @partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
        @partial(
            jax.shard_map,
            mesh=mesh.mesh,
            in_specs=(STACKED, STACKED, STACKED, STACKED, SHARDED),
            out_specs=STACKED,
            check_vma=False,
        )
        def write(
            cache: attention.Cache, counts: jax.Array, new: attention.Cache, chosen: jax.Array, batch: jax.Array
        ) -> tuple[attention.Cache, jax.Array]:
            b = layout.unpack(batch[0])
            return put(cache, new, b.position, b.page), count_choices(counts[:, 0], chosen)[:, None]

        return write

    def connect(self, bucket: Bucket, mesh: ExpertMesh) -> Any:
        """[ranks] -> their sum, for each of them: the least that makes XLA build the mesh's communicator, and tells how
        many of its ranks have something in common."""
        del bucket
        psum = partial(lax.psum, axis_name=AXIS)
        return jax.jit(jax.shard_map(psum, mesh=mesh.mesh, in_specs=SHARDED, out_specs=SHARDED, check_vma=False))


def resolve(checkpoint: Checkpoint, engine: EngineConfig, kind: str) -> tuple[Checkpoint, Any]:
    """What `engine.kernels` comes to on a device of this kind, and the checkpoint as those kernels read it: with 8-bit
    experts only where they multiply such. Raises ConfigError for kernels that cannot run."""
    refused = None
    if engine.kernels == "hopper" or (engine.kernels == "auto" and kind != "cpu"):
        from moe_jax import hopper  # Pallas takes its time to import

        types = param_types(checkpoint, engine.dtype)
        experts = [t for s in types["segments"] for name, t in s.items() if name in hopper.EXPERTS]
        refused = hopper.refusal(checkpoint.config, engine, kind, experts)
    kernels = choose(engine.kernels, kind, refused)
    return checkpoint if kernels == "hopper" else widened(checkpoint), kernels


def choose(kernels: str, kind: str, refused: str | None = None) -> Any:
    """What EngineConfig.kernels comes to on a device of this kind. refused: why not Hopper's (`hopper.refusal`).

    Raises ConfigError where there is no such thing.
    """
    if kernels == "native" and (kind != "cpu" or not native.available()):
        raise ConfigError(f"kernels: found native on {kind}, expected a CPU and a C++ compiler; try auto or xla")
    if kernels == "hopper" and refused:
        raise ConfigError(f"kernels: found hopper with {refused}; try auto or xla")
    if kernels != "auto":
        return kernels
    if kind == "cpu":
        return "native" if native.available() else "xla"
    return "xla" if refused else "hopper"


def _pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], tuple)


def _shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)
