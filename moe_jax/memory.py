"""What an engine takes of its device's memory: weights, workspace, and the KV cache's pages, which get the rest.

Pure arithmetic over configurations; it knows neither JAX nor devices.
"""

from math import prod

from moe_jax.config import ConfigError, EngineConfig, ModelConfig
from moe_jax.params import Param, iterate

SPARE = 2 << 30  # bytes for libraries, loaded programs and what lies between arrays


def _itemsize(engine: EngineConfig) -> int:
    return 2 if engine.dtype == "bfloat16" else 4


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def weight_bytes(model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes of a rank's parameters. model: as programs have it (`executables.resolve`), whose 8-bit experts stay so."""

    def one(param: Param, layers: int) -> int:
        copies = max(layers, 1) * (engine.slots_for(model.num_experts) if param.expert else 1)
        return copies * prod(param.shape) * (4 if param.float32 else 1 if param.float8 else _itemsize(engine))

    return sum(one(param, layers) for _, param, _, layers in iterate(model))


def position_bytes(model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes of a position's keys and values in all layers."""
    if model.latent is not None:
        each = model.latent.kv_rank + model.latent.rope_dim
    else:
        each = 2 * model.num_kv_heads * model.head_dim
    return model.num_layers * each * _itemsize(engine)


def workspace_bytes(model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes that the largest step takes beside weights and cache: an estimate from above.

    A step's new keys and values exist twice, as a loop's state and as its result. The experts' rows, of all ranks, are
    copied in, go through and are copied back. Logits are float32, and sampling takes two more arrays of their size.
    """
    size, most = _itemsize(engine), 0
    for bucket in engine.buckets:
        pairs = bucket.rows * engine.ranks * model.top_k
        experts = pairs * (2 * model.hidden_size + model.moe_intermediate_size) * size
        value_dim = model.latent.kv_rank if model.latent else model.head_dim
        attention = bucket.rows * model.num_heads * (2 * model.head_dim + 3 * value_dim) * 4
        new = 2 * bucket.rows * position_bytes(model, engine)
        scores = 3 * (bucket.rows if bucket.score else min(bucket.rows, engine.max_batch)) * model.vocab_size * 4
        most = max(most, new + max(experts + attention, scores))
    return most + SPARE


def pages_that_fit(model: ModelConfig, engine: EngineConfig, memory: int) -> int:
    """Pages of the KV cache that fit `memory` bytes of a device beside the rest.

    Raises ConfigError when not even one sequence of the greatest length fits.
    """
    weights, workspace = weight_bytes(model, engine), workspace_bytes(model, engine)
    page = position_bytes(model, engine) * engine.page_size
    pages = (memory - weights - workspace) // page
    if pages < engine.pages_per_sequence:
        sequence = engine.pages_per_sequence * page
        need = weights + workspace + sequence
        raise ConfigError(
            f"memory: found {_gib(memory)} for JAX on the device, expected at least {_gib(need)}: weights "
            f"{_gib(weights)}, workspace {_gib(workspace)}, a sequence of {engine.max_model_len} tokens "
            f"{_gib(sequence)}; use more ranks, or lower max_prefill_rows, max_batch or max_model_len"
        )
    return pages
