"""The engine of one process: its ranks' queues, caches and parameters, and the step that moves them all on.

All ranks of a mesh run the same compiled step in lockstep. Which step comes next is agreed inside the step: each rank
passes in the level it wishes (0: park, otherwise the number of a bucket, counted from 1), and the greatest comes back
with the tokens. When all wish nothing all park; a doorbell, a number that only grows and that every rank is told, wakes
them. A rank counts a bell as answered once all ranks have heard it (the agreed count of bells is the least), so a bell
that reaches one rank a step earlier than another wakes both. In the same way all learn after the same step that all
have heard of a new epoch: then they leave, and enter it together. No other word passes between ranks, but that
`connect` tells whether all of a mesh have its programs. (What an epoch's first step is for they are told with it.)

What a rank has on its device (parameters, cache) has the same shapes in every epoch. To enter one is to label the same
buffers as parts of another mesh, with other programs and another routing table.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.attention import cache_shapes
from moe_jax.batch_input import Layout, unpack_output
from moe_jax.checkpoint import Checkpoint, ExpertReader, first_moe_layers, load_params, widened
from moe_jax.config import Bucket, EngineConfig
from moe_jax.distributed import Loaded
from moe_jax.executables import Executables, Program
from moe_jax.mesh import REPLICATED, SHARDED, STACKED, ExpertMesh, param_specs
from moe_jax.placement import routing
from moe_jax.request import Request, SamplingParams, TokenEvent
from moe_jax.scheduler import Entry, Limits, Scheduler, StepPlan
from moe_jax.scheduler import Sequence as Tokens
from moe_jax.small import copied, filled, set_row

# Weights on the devices, as programs want them: by (rank of this process, layer with experts, expert), by parameter.
Experts = Mapping[tuple[int, int, int], Mapping[str, jax.Array]]


@dataclass(eq=False)
class ScoreJob:
    """A token list whose log-probabilities are wanted, chunk by chunk."""

    sequence: Tokens
    chunk: int
    rows: list[np.ndarray] = field(default_factory=list)  # [count, V] float32 of each chunk done


@dataclass(frozen=True)
class _Flight:
    """A step that the devices are doing."""

    bucket: Bucket
    plans: list[StepPlan]  # of this process's ranks, as all that follows
    vectors: list[np.ndarray]  # the batches
    proof: int
    out: list[jax.Array]
    tokens: list[jax.Array]  # sampled
    new: list[list[jax.Array]]  # K/V rows, and the experts that the rows chose
    logits: list[list[jax.Array]]
    written: bool  # the rows are on their way into the cache


@contextmanager
def _beside_steps() -> Iterator[None]:
    """Around work in a thread of its own: then it rests, for the steps want the processor, too."""
    begun = time.monotonic()
    yield
    time.sleep(3 * (time.monotonic() - begun))


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

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        devices: Sequence[jax.Device],
        slots: np.ndarray,
        programs: Executables,
    ) -> None:
        """Loads what this process's ranks hold. slots [layers with experts, ranks of this process, slots] int32."""
        checkpoint = checkpoint if programs.model.float8_experts else widened(checkpoint)
        self.model, self.config, self.programs = checkpoint.config, config, programs
        self._experts = ExpertReader(checkpoint, config.dtype)
        self.own = ExpertMesh(tuple(devices))  # this process's ranks, in any epoch
        self.slots = np.array(slots, np.int32)
        self.ranks = [Rank(Scheduler(Limits.of(config), config.prefix_caching)) for _ in devices]
        self.buckets = config.buckets
        self.layouts = {bucket: Layout(bucket, config) for bucket in self.buckets}
        call = programs.call
        self.params = [
            load_params(checkpoint, slots[:, i], device, config.dtype, call=call, prepare=programs.prepare)
            for i, device in enumerate(devices)
        ]
        dtype = jnp.dtype(config.dtype)
        self.cache = {
            name: self.own.assemble(
                [call(filled, device, np.float32(0), shape=shape, dtype=dtype) for device in devices], STACKED
            )
            for name, shape in cache_shapes(self.model, config).items()
        }
        shape = self.model.num_moe_layers, 1, self.model.num_experts
        zeros = [call(filled, device, np.float32(0), shape=shape, dtype=jnp.dtype("int32")) for device in devices]
        self.counts = self.own.assemble(zeros, STACKED)  # of tokens by layer and expert, modulo 2**32
        self._counted = np.zeros((self.model.num_moe_layers, self.model.num_experts), np.uint32)  # told of them
        self._counting: list[jax.Array] | None = None  # copies of them, on their way to the host
        self.mesh: ExpertMesh | None = None  # of the epoch; None: none has been entered, or it is lost
        self.fixed: list[jax.Array] = []  # the step's leading arguments in this epoch: parameters and routing table
        self._prepared: dict[tuple[jax.Device, ...], tuple[np.ndarray, list[jax.Array]]] = {}  # slots, what is fixed
        self.epoch = 0
        self.level = 0  # agreed for the next step; 0: parked
        self.bells_heard = 0
        self.bells_answered = 0
        self.epoch_heard = 0
        self.epoch_agreed = 0
        self.steps = 0
        self._flights: deque[_Flight] = deque()  # oldest first; two at most, and one unless all ranks are here
        none = np.zeros((1, config.max_batch), np.int32)
        self._none = self.own.shards(self.own.put([none] * len(devices), SHARDED))  # for a step that follows no other
        self.handed_over = 0  # programs of the mesh, to its devices
        self._tries = 0  # steps of this epoch, failed ones too; all its ranks count alike
        self.logits: dict[tuple[str, int], np.ndarray] = {}  # (request id, position) -> [V], with return_logits

    # Epochs

    def enter(
        self, epoch: int, mesh: ExpertMesh, slots: np.ndarray, fetched: Experts | None = None, prefill: int = 0
    ) -> float:
        """Form `mesh`, with all ranks of it doing the same. slots [layers with experts, ranks of the mesh, slots].

        Experts that this process should hold and does not are taken from `fetched`, or loaded. The next step is the
        first of the epoch; nothing is agreed before it, but that in the same mesh it is the step which the last one
        agreed on: who does not know that has left the mesh, and does not come back to it without a new communicator.
        In another mesh it is one for so many prompt tokens of some rank, `prefill`, which all have been told; 0: the
        smallest. Returns the seconds that experts took.
        """
        stays = self.mesh is not None and self.mesh.devices == mesh.devices
        level = self.level if stays else self._level_for(prefill and self.config.max_batch + prefill, True)
        self.leave()
        begun = time.monotonic()
        self.hold(slots[:, list(mesh.local)], fetched or {})
        seconds = time.monotonic() - begun
        prepared = self._prepared.get(mesh.devices)
        if prepared is not None and np.array_equal(prepared[0], slots):
            self.fixed = prepared[1]
        else:
            self.fixed = self._fix(mesh, slots)
        self._prepared.clear()
        self.mesh, self.epoch, self.level, self.epoch_agreed, self._tries = mesh, epoch, level, -1, 0
        self.epoch_heard = max(self.epoch_heard, epoch)
        return seconds

    def _fix(self, mesh: ExpertMesh, slots: np.ndarray) -> list[jax.Array]:
        return self._fix_table(mesh, routing(slots, self.model.num_experts, self.config.max_replicas))

    def _fix_table(self, mesh: ExpertMesh, table: np.ndarray) -> list[jax.Array]:
        params = jax.tree.map(lambda p, *shards: mesh.assemble(list(shards), p), param_specs(self.model), *self.params)
        return [*jax.tree.leaves(params), mesh.put([table] * len(mesh.local), REPLICATED)]

    def prepare(self, mesh: ExpertMesh, slots: np.ndarray) -> None:
        """Make ready what `enter(…, mesh, slots)` takes, in a thread beside steps: a mesh that a loss would leave."""
        if not self._changes(slots[:, list(mesh.local)]):
            with _beside_steps():
                self._prepared[mesh.devices] = np.array(slots), self._fix(mesh, slots)
        for bucket in self.buckets:
            if not bucket.score:
                with _beside_steps():
                    self.load_step(mesh, bucket)

    def connect(self, mesh: ExpertMesh, able: bool) -> bool:
        """Build the communicator of a mesh that may be entered later: all its ranks together, between the same two
        steps, for a device runs its programs in order. Whether all of them are `able`. Raises JaxRuntimeError if one
        of them is lost."""
        size = mesh.size
        connect = self.programs.load(self.programs.connection(size), mesh.devices)
        totals = connect([mesh.put([np.full(1, 1 + size * able, np.int32) for _ in mesh.local], SHARDED)])
        self.handed_over += 1
        # k that are able make size + size * k. What an abort leaves hardly is such a number; the next step finds out.
        found, rest = divmod(int(np.asarray(totals[0][0])[0]), size)
        if rest or not 1 <= found <= 1 + size:
            raise jax.errors.JaxRuntimeError(f"epoch {self.epoch}: a collective was aborted")
        return found == 1 + size

    def load_step(self, mesh: ExpertMesh, bucket: Bucket) -> Loaded:
        """The step's program; what is loaded beforehand, nobody waits for."""
        return self.programs.load(Program("step", bucket, mesh.size), mesh.devices)

    def has_steps(self, ranks: int) -> bool:
        """Whether none of the steps that `rehearse` would run in a mesh of so many ranks has to be compiled."""
        steps = [Program("step", bucket, ranks) for bucket in self.buckets if not bucket.score]
        return not self.programs.missing(steps)

    def rehearse(self, mesh: ExpertMesh, bucket: Bucket) -> None:
        """Run a mesh's step and the write behind it on nothing, all its ranks together: a GPU is given a program's code
        when it first runs, and after a loss nobody has time for that. Raises JaxRuntimeError as `connect`."""
        shape = self.model.num_moe_layers, self.model.num_experts, self.config.max_replicas
        fixed, proof = self._fix_table(mesh, np.zeros(shape, np.int32)), 1
        vectors = [self.layouts[bucket].pack(StepPlan(), (0, 0, 0, proof))[None] for _ in self.ranks]
        out, _, new, _ = self._run(mesh, fixed, bucket, self._none, mesh.put(vectors, SHARDED))
        if any(np.asarray(shard)[0][3] != proof for shard in out):
            raise jax.errors.JaxRuntimeError(f"epoch {self.epoch}: a step's collectives were aborted")
        self._write(bucket, new, self.own.put(vectors, SHARDED))

    def drain(self) -> None:
        """Wait until the devices have done what they were given before. From any thread. Raises JaxRuntimeError."""
        zero = np.float32(0)
        last = [self.programs.call(filled, d, zero, shape=(1,), dtype=jnp.dtype("float32")) for d in self.own.devices]
        jax.block_until_ready(last)

    def leave(self) -> None:
        """The epoch is over; no step until another one is entered. A step that was begun ahead did not happen."""
        if self._flights:
            jax.block_until_ready([flight.out for flight in self._flights])
            self._discard(self._flights[0].plans, self._flights[0].bucket)
            self._flights.clear()
        self.mesh = None

    def hold(self, slots: np.ndarray, fetched: Experts) -> None:
        """Make this process's slots what `slots` [layers with experts, ranks of this process, slots] says. -1: any."""
        for layer, i, slot in self._changes(slots):
            expert = int(slots[layer, i, slot])
            weights = fetched.get((i, layer, expert)) or self._read(i, layer, expert)
            self._set_slot(i, layer, slot, weights)
            self.slots[layer, i, slot] = expert
            self._prepared.clear()  # it holds the buffers that were donated

    def fetch(self, slots: np.ndarray) -> Experts:
        """Onto the devices, what `hold(slots)` would need: all that is left then is to copy it from there into its
        place. May run in a thread beside steps."""
        wanted = {(i, layer, int(slots[layer, i, slot])) for layer, i, slot in self._changes(slots)}
        fetched: dict[tuple[int, int, int], dict[str, jax.Array]] = {}
        for key in sorted(wanted):
            with _beside_steps():
                fetched[key] = jax.block_until_ready(self._read(*key))
        return fetched

    def prime(self) -> None:
        """Compile what draining, setting a slot and looking at loads take, so that none of them has to."""
        self.drain()
        self.look_at_loads()
        self.loads()
        for i in range(len(self.ranks)):
            for layer, slot in [(start, 0) for start in set(first_moe_layers(self.model)[:-1])]:
                expert = int(self.slots[layer, i, slot])
                if expert >= 0:
                    self._set_slot(i, layer, slot, self._read(i, layer, expert))

    def _changes(self, slots: np.ndarray) -> list[tuple[int, int, int]]:
        layers, ranks, places = np.nonzero((slots != self.slots) & (slots >= 0))
        return list(zip(layers.tolist(), ranks.tolist(), places.tolist(), strict=True))

    def _read(self, i: int, layer: int, expert: int) -> dict[str, jax.Array]:
        arrays = self._experts.read(layer, expert, self.programs.call)
        device, prepare = self.own.devices[i], self.programs.prepare
        return {name: prepare(name, jax.device_put(array, device)) for name, array in arrays.items()}

    def _set_slot(self, i: int, layer: int, slot: int, weights: Mapping[str, jax.Array]) -> None:
        starts = first_moe_layers(self.model)
        number = int(np.searchsorted(starts, layer, side="right")) - 1
        segment, at = self.params[i]["segments"][number], np.array([layer - starts[number], slot], np.int32)
        device, call = self.own.devices[i], self.programs.call
        for name, row in weights.items():
            segment[name] = call(set_row, device, segment[name], row, at)

    # Requests

    def add(self, rank: int, request: Request, accepted: bool = False) -> None:
        """Queue a request on the `rank`-th of this process's ranks. Raises as Scheduler.add."""
        self.ranks[rank].scheduler.add(request, accepted)

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache's pages that running requests hold, 0 to 1."""
        pools = [rank.scheduler.pool for rank in self.ranks]
        return sum(pool.num_used for pool in pools) / sum(pool.num_pages for pool in pools)

    @property
    def request_ids(self) -> list[str]:
        """Of all requests that are here."""
        return [request_id for rank in self.ranks for request_id in rank.scheduler.request_ids]

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
        job = ScoreJob(Tokens(request, list(token_ids)), min(chunk or len(token_ids), self.config.max_score_rows))
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
        """Whether there is nothing to do until a request arrives here, a doorbell rings, or an epoch begins."""
        if self.mesh is None:
            return True
        if self.mesh.is_local:
            return not self.has_work and self.epoch_agreed >= self.epoch_heard
        return self.level == 0 and self.bells_heard <= self.bells_answered and self.epoch_agreed >= 0

    # Steps

    def step(self, ahead: bool = False) -> list[TokenEvent]:
        """One step of the mesh. Returns the new tokens of this process's ranks.

        Blocks until the other ranks have done theirs; raises jax.errors.JaxRuntimeError when one of them is lost, with
        this engine as it was before the step.

        ahead: as `begin`.
        """
        self.begin(ahead)
        return self.finish()

    def begin(self, ahead: bool = False) -> None:
        """The first half of a step: hand it to the devices. What is done before `finish` costs no time.

        ahead: have the devices begin the next step before this one's tokens are seen, if that can be: if all ranks are
        this process's. None can be lost then, so K/V may be written and tokens decoded before anyone has read them.
        """
        if not self._flights:
            self._begin()
        if ahead and self._can_look_ahead:
            self._begin()

    @property
    def _can_look_ahead(self) -> bool:
        if len(self._flights) != 1 or not self._alone or any(rank.scores for rank in self.ranks):
            return False
        return all(rank.scheduler.can_look_ahead for rank in self.ranks) and any(map(self._level, self.ranks))

    @property
    def _alone(self) -> bool:
        return self.mesh is not None and self.mesh.is_local

    def _begin(self) -> None:
        mesh = self.mesh
        assert mesh is not None, "no epoch has been entered"
        level = max(map(self._level, self.ranks)) if self._alone else self.level
        bucket = self.buckets[(level or 1) - 1]
        plans = [self._plan(rank, bucket) for rank in self.ranks]
        self._tries += 1
        proof = 1 + (self.epoch << 16 ^ self._tries) % (1 << 30)  # that it is this step whose results are read
        try:
            heard = self.bells_heard, self.epoch_heard, proof
            vectors = [
                self.layouts[bucket].pack(plan, (0 if self._alone else self._level(rank), *heard))[None]
                for rank, plan in zip(self.ranks, plans, strict=True)
            ]
            batch = mesh.put(vectors, SHARDED)
            last = self._flights[-1].tokens if self._flights else self._none
            out, tokens, new, logits = self._run(mesh, self.fixed, bucket, last, batch)
            if self._alone:
                self._write(bucket, new, batch)
            self._flights.append(_Flight(bucket, plans, vectors, proof, out, tokens, new, logits, self._alone))
        except BaseException:
            self._discard(plans, bucket)
            raise

    def _run(
        self, mesh: ExpertMesh, fixed: list[jax.Array], bucket: Bucket, last: list[jax.Array], batch: jax.Array
    ) -> tuple[Any, ...]:
        """The step's program: its results as in _Flight."""
        cache = [self._label(mesh, array) for array in self.cache.values()]
        out, tokens, *rest = self.load_step(mesh, bucket)([*fixed, *cache, mesh.assemble(last, SHARDED), batch])
        self.handed_over += 1
        return out, tokens, rest[: len(cache) + 1], rest[len(cache) + 1 :]

    def finish(self) -> list[TokenEvent]:
        """Wait for the oldest step that was begun."""
        flight = self._flights[0]
        bucket, plans = flight.bucket, flight.plans
        try:
            outputs = [np.asarray(shard)[0] for shard in flight.out]  # blocks: errors surface here
            if any(output[3] != flight.proof for output in outputs):
                raise jax.errors.JaxRuntimeError(f"epoch {self.epoch}: a step's collectives were aborted")
            if outputs[0][0] < 0:
                raise RuntimeError(
                    f"kernels: found {self.programs.engine.kernels} here and others on another rank, expected the same "
                    "everywhere: the same moe-jax, C++ compiler and processor, or kernels='xla' on all ranks"
                )
        except BaseException:
            self._flights.clear()
            self._discard(plans, bucket)
            raise
        self._flights.popleft()
        if not flight.written:
            self._write(bucket, flight.new, self.own.put(flight.vectors, SHARDED))
        self.steps += 1
        seen = flight.logits[0] if flight.logits else [None] * len(self.ranks)
        events: list[TokenEvent] = []
        for rank, plan, output, scores in zip(self.ranks, plans, outputs, seen, strict=True):
            (self.level, self.bells_answered, self.epoch_agreed, _), sampled = unpack_output(output, plan)
            if bucket.score:
                self._complete_score(rank, plan, np.asarray(scores)[0])
                continue
            if scores is not None:
                self._keep_logits(plan, np.asarray(scores)[0])
            events += rank.scheduler.complete(plan, sampled)
        return events

    @property
    def in_flight(self) -> bool:
        """Whether a step has been begun ahead and not finished."""
        return bool(self._flights)

    def _label(self, mesh: ExpertMesh, array: jax.Array) -> jax.Array:
        """A cache array of this process's ranks as their part of the mesh's."""
        return array if mesh.devices == self.own.devices else mesh.assemble(self.own.shards(array), STACKED)

    def _write(self, bucket: Bucket, new: list[list[jax.Array]], batch: jax.Array) -> None:
        """Put a step's K/V rows into the cache and count the experts that they chose; what is written to is donated.
        Nobody else takes part. batch: on own devices."""
        own = self.own
        write = self.programs.load(Program("write", bucket, own.size), own.devices)
        rows = [own.assemble(shards, STACKED) for shards in new]
        *written, counts = write([*self.cache.values(), self.counts, *rows, batch])
        self.cache = {name: own.assemble(a, STACKED) for name, a in zip(self.cache, written, strict=True)}
        self.counts = own.assemble(counts, STACKED)

    def warm_up(self) -> None:
        """Run every program on nothing. All ranks of the mesh must do it at the same time."""
        assert self.mesh is not None, "no epoch has been entered"
        if self.programs.kind != "cpu":
            wanted = [(Program("step", bucket, self.mesh.size), self.mesh.devices) for bucket in self.buckets]
            wanted += [(Program("write", bucket, self.own.size), self.own.devices) for bucket in self.buckets]
            self.programs.load_all(wanted)
        for bucket in self.buckets:
            self.rehearse(self.mesh, bucket)
        jax.block_until_ready(self.cache)

    def rehearse_alone(self) -> None:
        """Before any epoch, on a GPU: run the programs of a mesh of this process's devices alone, if such a mesh could
        serve and nobody need compile them. A GPU is given a program's code when it first runs, and whoever is the only
        one left has no time for that."""
        covered = all(set(range(self.model.num_experts)) <= set(layer.ravel().tolist()) for layer in self.slots)
        if self.programs.kind == "cpu" or not covered:
            return
        if self.programs.missing(self.programs.wanted(self.own.size, self.own.size)):
            return
        self.mesh = self.own
        self.warm_up()
        self.leave()

    # Loads

    def look_at_loads(self) -> None:
        """Begin to read what was counted; waits for nothing. The counts themselves are donated to the next write."""
        shards = zip(self.own.devices, self.own.shards(self.counts), strict=True)
        self._counting = [self.programs.call(copied, device, shard) for device, shard in shards]
        for copy in self._counting:
            copy.copy_to_host_async()

    def loads(self) -> np.ndarray | None:
        """Tokens that each expert got since the last time, of requests of this process, int64 [layers, experts]; None
        before `look_at_loads`. Waits for the steps that had been begun then."""
        if self._counting is None:
            return None
        now = np.sum([np.asarray(copy)[:, 0].view(np.uint32) for copy in self._counting], axis=0, dtype=np.uint32)
        since, self._counted, self._counting = now - self._counted, now, None
        return np.asarray(since, np.int64)

    def _level(self, rank: Rank) -> int:
        """The level this rank wishes for the step after the one in flight, or for the next if there is none."""
        rows, prefill = rank.scheduler.wish()
        return self._level_for(rows, prefill) or (len(self.buckets) if rank.scores else 0)

    def _level_for(self, rows: int, prefill: bool) -> int:
        return self.buckets.index(self.config.bucket_for(rows, prefill)) + 1 if rows else 0

    def _plan(self, rank: Rank, bucket: Bucket) -> StepPlan:
        return self._plan_score(rank) if bucket.score else rank.scheduler.schedule(bucket.rows, bucket.prefill)

    def _discard(self, plans: list[StepPlan], bucket: Bucket) -> None:
        for rank, plan in zip(self.ranks, plans, strict=True):
            if not bucket.score:
                rank.scheduler.discard(plan)

    def _keep_logits(self, plan: StepPlan, logits: np.ndarray) -> None:
        for i, e in enumerate(plan.sampled):
            if not e.sequence.ended:
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
