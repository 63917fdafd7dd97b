"""One step's input and output of one rank, each as a single int32 vector.

A step takes some twenty small arrays. Sent one by one they cost more than a small model's step, so they travel packed:
`Layout` gives each field its place, packs a plan into a vector with numpy, and cuts it up again on the device.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.attention import Entries
from moe_jax.config import Bucket, EngineConfig
from moe_jax.request import MAX_LOGPROBS
from moe_jax.sampling import Sampled, SampleParams
from moe_jax.scheduler import Sampled as HostSampled
from moe_jax.scheduler import StepPlan


@dataclass(frozen=True)
class StepInput:
    """The fields on the device."""

    token: jax.Array  # [T]
    position: jax.Array  # [T], 0 for padding
    page: jax.Array  # [T] page that the row's K/V go to, -1 for padding
    entries: Entries
    sample_row: jax.Array  # [S]
    num_sampled: jax.Array  # []
    sampling: SampleParams
    want_top: jax.Array  # []
    wish: jax.Array  # [2] what this rank contributes to the agreement, see engine.py


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
            "counts": (6,),  # decode rows, tiles, samples, want_top, wish, bell
            "token": (rows,),
            "position": (rows,),
            "page": (rows,),
            "tile_entry": (rows // self.engine.row_tile,),
            "tables": (entries, self.engine.pages_per_sequence),
            "start": (entries,),
            "first_row": (entries,),
            "sample_row": (samples,),
            "temperature": (samples,),
            "top_p": (samples,),
            "top_k": (samples,),
            "seed": (samples, 2),
            "sample_position": (samples,),
        }
        out, offset = {}, 0
        for name, shape in shapes.items():
            out[name] = (offset, shape)
            offset += int(np.prod(shape))
        return out

    @cached_property
    def size(self) -> int:
        offset, shape = self.fields["sample_position"]
        return offset + shape[0]

    def pack(self, plan: StepPlan, wish: int, bell: int) -> np.ndarray:
        """[size] int32. Raises ValueError when the plan does not fit the bucket."""
        if plan.rows > self.bucket.rows or len(plan.entries) > self.num_entries:
            raise ValueError(f"plan of {plan.rows} rows, {len(plan.entries)} entries does not fit {self.bucket}")
        vector = np.zeros(self.size, np.int32)
        view = {
            name: vector[offset : offset + int(np.prod(shape))].reshape(shape)
            for name, (offset, shape) in self.fields.items()
        }
        tile, page_size = self.engine.row_tile, self.engine.page_size
        view["page"][:] = -1
        sampled = plan.sampled
        top = any(e.sequence.request.params.logprobs for e in sampled)
        view["counts"][:] = plan.decode_rows, plan.rows // tile, len(sampled), top, wish, bell
        for i, e in enumerate(plan.entries):
            s, rows, stop = e.sequence, slice(e.first_row, e.first_row + e.count), e.start + e.count
            pages = np.asarray(s.pages, np.int32)
            positions = np.arange(e.start, stop)
            view["token"][rows] = s.token_ids[e.start : stop]
            view["position"][rows] = positions
            view["page"][rows] = pages[positions // page_size]
            view["tables"][i, : len(pages)] = pages
            view["start"][i], view["first_row"][i] = e.start, e.first_row
            if not e.is_decode:
                view["tile_entry"][e.first_row // tile : -(-(e.first_row + e.count) // tile)] = i
        for i, e in enumerate(sampled):
            p = e.sequence.request.params
            view["sample_row"][i] = e.sample_row
            view["temperature"].view(np.float32)[i] = p.temperature
            view["top_p"].view(np.float32)[i] = p.top_p
            view["top_k"][i] = p.top_k
            view["seed"].view(np.uint32)[i] = np.uint64(p.seed or 0) & np.uint64(0xFFFFFFFF), np.uint64(p.seed or 0) >> np.uint64(32)
            view["sample_position"][i] = e.sample_position
        return vector

    def unpack(self, vector: jax.Array) -> StepInput:
        f = {
            name: vector[offset : offset + int(np.prod(shape))].reshape(shape)
            for name, (offset, shape) in self.fields.items()
        }
        as_float = lambda x: lax.bitcast_convert_type(x, jnp.float32)  # noqa: E731
        decode, tiles, samples, top = (f["counts"][i] for i in range(4))
        return StepInput(
            token=f["token"],
            position=f["position"],
            page=f["page"],
            entries=Entries(f["tables"], f["start"], f["first_row"], f["tile_entry"], decode, tiles),
            sample_row=f["sample_row"],
            num_sampled=samples,
            sampling=SampleParams(
                temperature=as_float(f["temperature"]),
                top_p=as_float(f["top_p"]),
                top_k=f["top_k"],
                seed=lax.bitcast_convert_type(f["seed"], jnp.uint32),
                position=f["sample_position"],
            ),
            want_top=top > 0,
            wish=f["counts"][4:6],
        )


def pack_output(agreed: jax.Array, sampled: Sampled) -> jax.Array:
    """agreed [2]; one int32 vector [2 + S * (2 + 2 * MAX_LOGPROBS)]."""
    bits = lambda x: lax.bitcast_convert_type(x, jnp.int32)  # noqa: E731
    parts = (agreed, sampled.token, bits(sampled.logprob), sampled.top_tokens, bits(sampled.top_logprobs))
    return jnp.concatenate([x.reshape(-1) for x in parts])


def unpack_output(vector: np.ndarray, plan: StepPlan) -> tuple[int, int, list[HostSampled]]:
    """(agreed wish, agreed bell, what was sampled for each of plan.sampled)."""
    body = vector[2:]
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
    return int(vector[0]), int(vector[1]), out
