"""The engine of one process: its ranks' queues, caches and parameters, and the step that moves them all on.

All ranks of a mesh run the same compiled step in lockstep. Which step comes next is agreed inside the step: each rank
passes in the level it wishes (0: park, otherwise the number of a bucket, counted from 1), and the greatest comes back
with the tokens. When all wish nothing all park; a doorbell, a number that only grows and that every rank is told, wakes
them. A rank counts a bell as answered once all ranks have heard it (the agreed count of bells is the least), so a bell
that reaches one rank a step earlier than another wakes both. No other word passes between ranks.
"""

from collections import deque
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.attention import cache_shapes
from moe_jax.batch_input import Layout, unpack_output
from moe_jax.checkpoint import Checkpoint, load_params
from moe_jax.config import Bucket, EngineConfig
from moe_jax.executables import Executables
from moe_jax.kernels.expert_ffn import prepare
from moe_jax.mesh import REPLICATED, SHARDED, STACKED, ExpertMesh, param_specs, place_experts, routing_table
from moe_jax.request import Request, SamplingParams, TokenEvent
from moe_jax.scheduler import Entry, Limits, Scheduler, Sequence, StepPlan


@dataclass(eq=False)
class ScoreJob:
    """A token list whose log-probabilities are wanted, chunk by chunk."""

    sequence: Sequence
    chunk: int
    rows: list[np.ndarray] = field(default_factory=list)  # [count, V] float32 of each chunk done


@dataclass
class Rank:
    """One rank of this process."""

    scheduler: Scheduler
    scores: deque[ScoreJob] = field(default_factory=deque)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.scores)


class Engine:
    """Serves the requests of this process's ranks. Not thread-safe: one thread adds, cancels and steps."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, mesh: ExpertMesh) -> None:
        """Loads what this process's ranks hold of the checkpoint."""
        model = checkpoint.config
        self.model, self.config, self.mesh = model, config, mesh
        slot_experts = place_experts(model, mesh.size, config.slots_for(model.num_experts))
        self.ranks = [Rank(Scheduler(Limits.of(config), config.prefix_caching)) for _ in mesh.local]
        self.buckets = config.buckets
        self.layouts = {bucket: Layout(bucket, config) for bucket in self.buckets}
        self.executables = Executables(model, config, mesh)
        loaded = [load_params(checkpoint, slot_experts[i], mesh.devices[i], config.dtype) for i in mesh.local]
        for params in loaded:
            for segment in params["segments"]:
                segment |= {name: prepare(a) for name, a in segment.items() if name.startswith("experts_")}
        self.params = jax.tree.map(lambda spec, *shards: mesh.assemble(list(shards), spec), param_specs(model), *loaded)
        tables = [routing_table(slot_experts[:, i], model.num_experts) for i in range(model.num_moe_layers)]
        self.table = mesh.put([np.stack(tables)] * len(mesh.local), REPLICATED)
        dtype = jnp.dtype(config.dtype)
        self.cache = {
            name: mesh.assemble([jnp.zeros(shape, dtype, device=mesh.devices[i]) for i in mesh.local], STACKED)
            for name, shape in cache_shapes(model, config).items()
        }
        self.level = 0  # agreed for the next step; 0: parked
        self.bells_heard = 0
        self.bells_answered = 0
        self.steps = 0
        self.logits: dict[tuple[str, int], np.ndarray] = {}  # (request id, position) -> [V], with return_logits

    # Requests

    def add(self, rank: int, request: Request, accepted: bool = False) -> None:
        """Queue a request on the `rank`-th of this process's ranks. Raises as Scheduler.add."""
        self.ranks[rank].scheduler.add(request, accepted)

    def cancel(self, request_id: str) -> bool:
        return any(rank.scheduler.cancel(request_id) for rank in self.ranks)

    def add_score(self, rank: int, token_ids: list[int], chunk: int | None = None) -> ScoreJob:
        """Ask for the log-probabilities after each token; `chunk` tokens a step, as many as fit by default."""
        pages = -(-len(token_ids) // self.config.page_size)
        if not 1 <= len(token_ids) <= self.config.max_model_len or pages > self.config.num_pages:
            raise ValueError(
                f"token_ids: found {len(token_ids)} tokens, expected 1 to {self.config.max_model_len} (max_model_len) "
                f"that fit {self.config.num_pages} pages of {self.config.page_size}"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: found {chunk}, expected at least 1")
        request = Request("score", tuple(token_ids), SamplingParams())
        job = ScoreJob(Sequence(request, list(token_ids)), min(chunk or len(token_ids), self.config.max_prefill_rows))
        self.ranks[rank].scores.append(job)
        return job

    def cancel_score(self, job: ScoreJob) -> None:
        """Forget a job, done or not."""
        for rank in self.ranks:
            if job in rank.scores:
                rank.scores.remove(job)
                rank.scheduler.pool.release(job.sequence.pages)

    @property
    def has_work(self) -> bool:
        return any(rank.has_work for rank in self.ranks)

    @property
    def parked(self) -> bool:
        """Whether there is nothing to do until a request arrives here or a doorbell rings."""
        if self.mesh.is_local:
            return not self.has_work
        return self.level == 0 and self.bells_heard <= self.bells_answered

    # Steps

    def step(self) -> list[TokenEvent]:
        """One step of the mesh. Returns the new tokens of this process's ranks.

        Blocks until the other ranks have done theirs; raises jax.errors.JaxRuntimeError when one of them is lost, with
        this engine as it was before the step.
        """
        alone = self.mesh.is_local
        level = max(self._level(rank) for rank in self.ranks) if alone else self.level
        bucket = self.buckets[(level or 1) - 1]
        layout = self.layouts[bucket]
        plans = [self._plan(rank, bucket) for rank in self.ranks]
        try:
            vectors = [
                layout.pack(plan, 0 if alone else self._level(rank), self.bells_heard)
                for rank, plan in zip(self.ranks, plans, strict=True)
            ]
            batch = self.mesh.put([v[None] for v in vectors], SHARDED)
            out, new, logits = self.executables.step(bucket)(self.params, self.table, self.cache, batch)
            outputs = [np.asarray(shard)[0] for shard in self.mesh.shards(out)]  # blocks: errors surface here
        except BaseException:
            for rank, plan in zip(self.ranks, plans, strict=True):
                self._discard(rank, plan, bucket)
            raise
        self.cache = self.executables.write(bucket)(self.cache, new, batch)
        self.steps += 1
        seen = self.mesh.shards(logits) if logits is not None else [None] * len(self.ranks)
        events: list[TokenEvent] = []
        for rank, plan, output, scores in zip(self.ranks, plans, outputs, seen, strict=True):
            self.level, self.bells_answered, sampled = unpack_output(output, plan)
            if bucket.score:
                self._complete_score(rank, plan, np.asarray(scores)[0])
                continue
            if scores is not None:
                self._keep_logits(plan, np.asarray(scores)[0])
            events += rank.scheduler.complete(plan, sampled)
        return events

    def warm_up(self) -> None:
        """Compile every program by running it on nothing. All ranks of the mesh must do it at the same time."""
        for bucket in self.buckets:
            empty = [self.layouts[bucket].pack(StepPlan(), 0, 0)[None] for _ in self.ranks]
            batch = self.mesh.put(empty, SHARDED)
            out, new, _ = self.executables.step(bucket)(self.params, self.table, self.cache, batch)
            jax.block_until_ready(out)
            self.cache = self.executables.write(bucket)(self.cache, new, batch)
        jax.block_until_ready(self.cache)

    def _level(self, rank: Rank) -> int:
        """The level this rank wishes for the step after the one in flight, or for the next if there is none."""
        rows, prefill = rank.scheduler.wish()
        if rows:
            return self.buckets.index(self.config.bucket_for(rows, prefill)) + 1
        return len(self.buckets) if rank.scores else 0

    def _plan(self, rank: Rank, bucket: Bucket) -> StepPlan:
        return self._plan_score(rank) if bucket.score else rank.scheduler.schedule(bucket.rows, bucket.prefill)

    def _discard(self, rank: Rank, plan: StepPlan, bucket: Bucket) -> None:
        if not bucket.score:
            rank.scheduler.discard(plan)

    def _keep_logits(self, plan: StepPlan, logits: np.ndarray) -> None:
        for i, e in enumerate(plan.sampled):
            self.logits[e.sequence.request.request_id, e.sample_position] = logits[i].copy()

    # Scoring: a prefill whose rows all return their log-probabilities

    def _plan_score(self, rank: Rank) -> StepPlan:
        if not rank.scores:
            return StepPlan()
        job = rank.scores[0]
        sequence, pool = job.sequence, rank.scheduler.pool
        count = min(job.chunk, sequence.remaining)
        needed = -(-(sequence.num_computed + count) // self.config.page_size) - len(sequence.pages)
        if needed > pool.num_available:
            return StepPlan()  # the running requests go first
        sequence.pages += [pool.allocate() for _ in range(needed)]
        entry = Entry(sequence, sequence.num_computed, count, 0, sample=False, is_decode=False)
        return StepPlan([entry], 0, -(-count // self.config.row_tile) * self.config.row_tile)

    def _complete_score(self, rank: Rank, plan: StepPlan, scores: np.ndarray) -> None:
        for e in plan.entries:
            job = rank.scores[0]
            job.rows.append(scores[: e.count].copy())
            job.sequence.num_computed += e.count
            if not job.sequence.remaining:
                rank.scheduler.pool.release(job.sequence.pages)
                rank.scores.popleft()
