"""One step's input and output of one rank, each as a single int32 vector.

A step takes some twenty small arrays. Sent one by one they cost more than a small model's step, so they travel packed:
`Layout` gives each field its place, packs a plan into a vector with numpy, and cuts it up again on the device.
"""

import math
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.attention import Entries
from moe_jax.config import Bucket, EngineConfig
from moe_jax.request import MAX_LOGPROBS, SamplingParams
from moe_jax.sampling import Sampled, SampleParams
from moe_jax.scheduler import Sampled as HostSampled
from moe_jax.scheduler import StepPlan

_ALIGN = 64  # words: a field may be handed to a GPU's kernel where it lies, and such take 256 bytes


@dataclass(frozen=True)
class StepInput:
    """The fields on the device."""

    token: jax.Array  # [T]; -1 - i is the token that the step before sampled at place i
    position: jax.Array  # [T], 0 for padding
    page: jax.Array  # [T] page that the row's K/V go to, -1 for padding
    entries: Entries
    sample_row: jax.Array  # [S]
    num_sampled: jax.Array  # []
    sampling: SampleParams
    want_top: jax.Array  # []
    wish: jax.Array  # [3] what this rank contributes to the agreement, see engine.py


@dataclass(frozen=True)
class Layout:
    """Where each field of a bucket's vectors lies."""

    bucket: Bucket
    engine: EngineConfig

    @cached_property
    def num_entries(self) -> int:
        if not self.bucket.prefill:
            return self.bucket.rows
        return self.engine.max_batch + (self.bucket.rows - self.engine.max_batch) // self.engine.row_tile

    @cached_property
    def num_samples(self) -> int:
        return min(self.bucket.rows, self.engine.max_batch)

    @cached_property
    def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """name -> (offset, shape), in int32 words."""
        rows, entries, samples = self.bucket.rows, self.num_entries, self.num_samples
        shapes = {
            "counts": (8,),  # decode rows, tiles, samples, want_top, wish, bell, epoch, proof
            "token": (rows,),
            "position": (rows,),
            "page": (rows,),
            "tile_entry": (rows // self.engine.row_tile,),
            "tables": (entries, self.engine.pages_per_sequence),
            "start": (entries,),
            "first_row": (entries,),
            "samples": (samples, 7),  # row, position, then _sampling_words
        }
        out, offset = {}, 0
        for name, shape in shapes.items():
            out[name] = (offset, shape)
            offset += -(-math.prod(shape) // _ALIGN) * _ALIGN
        return out

    @cached_property
    def size(self) -> int:
        offset, shape = self.fields["samples"]
        return offset + math.prod(shape)

    def _cut(self, vector: Any) -> dict[str, Any]:
        """The fields of a numpy or JAX vector; views, with numpy."""
        return {
            name: vector[offset : offset + math.prod(shape)].reshape(shape)
            for name, (offset, shape) in self.fields.items()
        }

    def pack(self, plan: StepPlan, wish: tuple[int, int, int, int] = (0, 0, 0, 0)) -> np.ndarray:
        """[size] int32. Raises ValueError when the plan does not fit the bucket."""
        if plan.rows > self.bucket.rows or len(plan.entries) > self.num_entries:
            raise ValueError(f"plan of {plan.rows} rows, {len(plan.entries)} entries does not fit {self.bucket}")
        vector = np.zeros(self.size, np.int32)
        view = self._cut(vector)
        tile, page_size, sampled = self.engine.row_tile, self.engine.page_size, plan.sampled
        top = any(e.sequence.request.params.logprobs for e in sampled)
        view["counts"][:] = plan.decode_rows, plan.rows // tile, len(sampled), top, *wish
        view["page"][:] = -1
        tables = view["tables"]
        for i, e in enumerate(plan.entries):
            tables[i, : len(e.sequence.pages)] = e.sequence.pages
        view["start"][: len(plan.entries)] = [e.start for e in plan.entries]
        view["first_row"][: len(plan.entries)] = [e.first_row for e in plan.entries]
        n = plan.decode_rows
        view["token"][:n] = [
            e.sequence.token_ids[e.start] if e.after is None else -1 - e.after for e in plan.entries[:n]
        ]
        view["position"][:n] = view["start"][:n]
        view["page"][:n] = tables[np.arange(n), view["start"][:n] // page_size]
        for i, e in enumerate(plan.entries[n:], n):
            rows, position = slice(e.first_row, e.first_row + e.count), np.arange(e.start, e.start + e.count)
            view["token"][rows] = e.sequence.token_ids[e.start : e.start + e.count]
            view["position"][rows] = position
            view["page"][rows] = tables[i, position // page_size]
            view["tile_entry"][e.first_row // tile : -(-(e.first_row + e.count) // tile)] = i
        if sampled:
            view["samples"][: len(sampled)] = [
                (e.sample_row, e.sample_position, *_sampling_words(e.sequence.request.params)) for e in sampled
            ]
        return vector

    def unpack(self, vector: jax.Array) -> StepInput:
        f = self._cut(vector)
        row, position, temperature, top_p, top_k, low, high = f["samples"].T
        decode, tiles, samples, top = (f["counts"][i] for i in range(4))
        return StepInput(
            token=f["token"],
            position=f["position"],
            page=f["page"],
            entries=Entries(f["tables"], f["start"], f["first_row"], f["tile_entry"], decode, tiles),
            sample_row=row,
            num_sampled=samples,
            sampling=SampleParams(
                temperature=lax.bitcast_convert_type(temperature, jnp.float32),
                top_p=lax.bitcast_convert_type(top_p, jnp.float32),
                top_k=top_k,
                seed=lax.bitcast_convert_type(jnp.stack([low, high], axis=1), jnp.uint32),
                position=position,
            ),
            want_top=top > 0,
            wish=f["counts"][4:8],
        )


@lru_cache(maxsize=4096)
def _sampling_words(p: SamplingParams) -> tuple[int, ...]:
    """temperature, top_p, top_k, seed (low word first) as five int32."""
    return struct.unpack("<5i", struct.pack("<ffiQ", p.temperature, p.top_p, p.top_k, p.seed or 0))


def pack_output(agreed: jax.Array, sampled: Sampled) -> jax.Array:
    """agreed [4]; one int32 vector [4 + S * (2 + 2 * MAX_LOGPROBS)]."""
    bits = lambda x: lax.bitcast_convert_type(x, jnp.int32)  # noqa: E731
    parts = (agreed, sampled.token, bits(sampled.logprob), sampled.top_tokens, bits(sampled.top_logprobs))
    return jnp.concatenate([x.reshape(-1) for x in parts])


def unpack_output(vector: np.ndarray, plan: StepPlan) -> tuple[tuple[int, int, int, int], list[HostSampled]]:
    """What was agreed (level, bells, epoch, proof), and what was sampled for each of plan.sampled."""
    body = vector[4:]
    n = body.size // (2 + 2 * MAX_LOGPROBS)
    token, logprob = body[:n].tolist(), body[n : 2 * n].view(np.float32).tolist()
    out: list[HostSampled] = []
    for i, e in enumerate(plan.sampled):
        wanted = e.sequence.request.params.logprobs or 0
        top: list[tuple[int, float]] = []
        if wanted:
            at = 2 * n + i * MAX_LOGPROBS
            ids = body[at : at + wanted].tolist()
            at += n * MAX_LOGPROBS
            top = list(zip(ids, body[at : at + wanted].view(np.float32).tolist(), strict=True))
        out.append((token[i], logprob[i], top))
    level, bells, epoch, proof = vector[:4].tolist()
    return (level, bells, epoch, proof), out
