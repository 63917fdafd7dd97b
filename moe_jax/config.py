"""What a model and an engine are, as plain numbers.

`ModelConfig` is read from a Hugging Face `config.json`; the families differ by a few named fields, not by code.
`EngineConfig` says how the model is run. Neither knows JAX, and neither reads anything but the one JSON file.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3")
_DEFAULTS: dict[str, dict[str, Any]] = {  # what `transformers` takes where a config.json says nothing
    "qwen3_moe": {"num_key_value_heads": 4},
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "olmoe": {"rms_norm_eps": 1e-5},
    "deepseek_v2": {"n_shared_experts": 2, "q_lora_rank": 1536},
    "deepseek_v3": {
        "n_shared_experts": 1,
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
    },
}


class ConfigError(ValueError):
    """A model or engine that cannot be run: the message names what was found and what was expected."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of `dim` numbers a head (Su et al. 2021), with the scalings found in checkpoints."""

    dim: int
    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
    attention_factor: float = 1.0  # multiplies cos and sin
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def inverse_frequencies(self) -> list[float]:
        """`dim / 2` angular frequencies. yarn: Peng et al. 2023 (arXiv 2309.00071), section 3.2; llama3: Llama 3.1."""
        plain = [self.theta ** (-2 * i / self.dim) for i in range(self.dim // 2)]
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        if self.kind == "llama3":
            return [self._llama3(f) for f in plain]
        if self.kind == "yarn":
            low, high = self._yarn_dimension(self.beta_fast), self._yarn_dimension(self.beta_slow)
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.dim - 1)
            width = (high - low) or 0.001
            keep = [1 - min(max((i - low) / width, 0.0), 1.0) for i in range(self.dim // 2)]
            return [f * k + f / self.factor * (1 - k) for f, k in zip(plain, keep, strict=True)]
        return plain

    def _yarn_dimension(self, rotations: float) -> float:
        return self.dim * math.log(self.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

    def _llama3(self, f: float) -> float:
        turns = self.original_max_position * f / (2 * math.pi)
        if turns < self.low_freq_factor:
            return f / self.factor
        if turns > self.high_freq_factor:
            return f
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * f / self.factor + smooth * f


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds `kv_rank + rope` numbers a token."""

    q_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float = 1e-6  # of the norms of the latents: not the config's rms_norm_eps in any implementation


@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys; with latent attention nope_dim + rope_dim
    max_position: int
    rms_norm_eps: float
    tie_embeddings: bool
    rope: Rope
    attention_scale: float
    moe_layers: tuple[bool, ...]  # which layers have experts; the others are dense
    intermediate_size: int  # of dense layers
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int = 0  # 0: no shared experts
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None
    attention_bias: bool = False
    latent: Latent | None = None
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    routing_bias: bool = False  # added to the scores when experts are chosen, not when they are weighted
    normalize_weights: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    eos_token_ids: tuple[int, ...] = ()
    float8_experts: bool = False  # experts are float8_e4m3fn, with a scale for each 128 x 128 block

    @property
    def segments(self) -> tuple[tuple[bool, int, int], ...]:
        """Runs of like layers, each scanned as one: (has experts, first layer, number of layers)."""
        runs: list[tuple[bool, int, int]] = []
        for i, moe in enumerate(self.moe_layers):
            if runs and runs[-1][0] == moe:
                runs[-1] = (moe, runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((moe, i, 1))
        return tuple(runs)

    @property
    def num_moe_layers(self) -> int:
        return sum(self.moe_layers)

    @staticmethod
    def from_json(path: str | Path) -> "ModelConfig":
        """Read a `config.json`, or that of a directory. Raises ConfigError with the file's name."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text())
        except OSError as e:
            raise ConfigError(f"{file}: cannot be read ({e.strerror}); a model directory needs a config.json") from None
        except ValueError as e:
            raise ConfigError(f"{file}: not valid JSON ({e})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: expected a JSON object, found {type(raw).__name__}")
        try:
            return parse_hugging_face(raw)
        except ConfigError as e:
            raise ConfigError(f"{file}: {e}") from None


class _Fields:
    """Typed access to a config dict, with errors that name the field."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw

    def get(self, *names: str, default: Any = None) -> Any:
        return next((self.raw[n] for n in names if self.raw.get(n) is not None), default)

    def int(self, *names: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{' or '.join(names)}: expected an integer of at least {least}, found {value!r}")
        return value

    def float(self, *names: str, default: float | None = None) -> float:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{' or '.join(names)}: expected a number, found {value!r}")
        return float(value)


def parse_hugging_face(raw: dict[str, Any]) -> ModelConfig:
    """The fields of a Hugging Face config, old and new spellings, as a ModelConfig. Raises ConfigError."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}")
    raw = {**_DEFAULTS[family], **raw}
    f = _Fields(raw)
    if f.get("hidden_act", default="silu") != "silu":
        raise ConfigError(f"hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'")
    hidden, layers, heads = f.int("hidden_size"), f.int("num_hidden_layers"), f.int("num_attention_heads")
    experts = f.int("num_experts", "num_local_experts", "n_routed_experts")
    top_k = f.int("num_experts_per_tok")
    max_position = f.int("max_position_embeddings", default=4096)
    if top_k > experts:
        raise ConfigError(f"num_experts_per_tok {top_k} exceeds the number of experts {experts}")
    deepseek = family.startswith("deepseek")
    latent = None
    if deepseek:
        latent = Latent(
            q_rank=None if raw["q_lora_rank"] is None else f.int("q_lora_rank"),
            kv_rank=f.int("kv_lora_rank"),
            nope_dim=f.int("qk_nope_head_dim"),
            rope_dim=f.int("qk_rope_head_dim"),
            v_dim=f.int("v_head_dim"),
        )
    head_dim = latent.nope_dim + latent.rope_dim if latent else f.int("head_dim", default=hidden // heads)
    kv_heads = heads if latent else f.int("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    window = raw.get("sliding_window") if family == "mixtral" or raw.get("use_sliding_window") else None
    if window is not None and window < max_position:
        max_position = window  # within the window, windowed attention is full attention
    rope, softmax_gain = _parse_rope(f, latent.rope_dim if latent else head_dim, family)
    moe_intermediate = f.int("moe_intermediate_size", "intermediate_size")
    groups = f.int("n_group", default=1) if deepseek else 1
    if family == "deepseek_v2" and raw.get("topk_method", "greedy") == "greedy":
        groups = 1
    top_groups = f.int("topk_group", default=1) if groups > 1 else 1
    if family == "deepseek_v3" and experts // groups < 2:
        raise ConfigError(f"n_group {groups}: expected at least 2 of the {experts} experts in a group")
    if experts % groups or top_groups > groups or top_k > experts // groups * top_groups:
        raise ConfigError(f"n_group {groups}, topk_group {top_groups} do not fit {experts} experts, top {top_k}")
    return ModelConfig(
        model_type=family,
        vocab_size=f.int("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=f.float("rms_norm_eps", default=1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope=rope,
        attention_scale=head_dim**-0.5 * softmax_gain,
        moe_layers=_parse_moe_layers(f, family, layers),
        intermediate_size=f.int("intermediate_size"),
        moe_intermediate_size=moe_intermediate,
        num_experts=experts,
        top_k=top_k,
        shared_intermediate_size=moe_intermediate * f.int("n_shared_experts", default=0, least=0) if deepseek else 0,
        qk_norm={"qwen3_moe": "head", "olmoe": "full"}.get(family, "none"),  # type: ignore[arg-type]
        clip_qkv=None if raw.get("clip_qkv") is None else f.float("clip_qkv"),
        attention_bias=bool(raw.get("attention_bias", False)),
        latent=latent,
        scoring="sigmoid" if family == "deepseek_v3" else "softmax",
        routing_bias=family == "deepseek_v3",
        # Mixtral always normalises, DeepSeek-V2 never does; the others say so.
        normalize_weights={"mixtral": True, "deepseek_v2": False}.get(family, bool(raw.get("norm_topk_prob"))),
        routed_scale=f.float("routed_scaling_factor", default=1.0) if deepseek else 1.0,
        num_groups=groups,
        top_groups=top_groups,
        group_score="top2" if family == "deepseek_v3" else "max",
        eos_token_ids=_ids(raw.get("eos_token_id")),
        float8_experts=_has_float8(f) and hidden % 128 == 0 and moe_intermediate % 128 == 0,
    )


def _has_float8(f: _Fields) -> bool:
    """Whether weights are e4m3 in blocks of 128 x 128, as DeepSeek-V3 publishes them. Other quantisations are refused,
    for their tensors have other names and meanings."""
    q = f.get("quantization_config", default={})
    if not q:
        return False
    found = {name: q.get(name) for name in ("quant_method", "fmt", "weight_block_size")} if isinstance(q, dict) else q
    if found not in [dict(quant_method="fp8", fmt=fmt, weight_block_size=[128, 128]) for fmt in ("e4m3", None)]:
        raise ConfigError(
            f"quantization_config: found {found}, expected quant_method 'fp8', fmt 'e4m3', weight_block_size [128, 128]"
        )
    return True


def _ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) for i in ids):
        raise ConfigError(f"eos_token_id: expected an integer or a list of integers, found {value!r}")
    return ids


def _parse_moe_layers(f: _Fields, family: str, layers: int) -> tuple[bool, ...]:
    if family.startswith("deepseek"):
        first = f.int("first_k_dense_replace", default=0, least=0)
        every = f.int("moe_layer_freq", default=1)
        return tuple(i >= first and i % every == 0 for i in range(layers))
    dense = f.get("mlp_only_layers", default=[])
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers: expected a list of layers, found {dense!r}")
    step = f.int("decoder_sparse_step", default=1)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _parse_rope(f: _Fields, dim: int, family: str) -> tuple[Rope, float]:
    """The rotary embedding, and what DeepSeek multiplies the softmax scale by."""
    given = [f.get(name, default={}) for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(g, dict) for g in given):
        raise ConfigError(f"rope_scaling or rope_parameters: expected an object, found {given}")
    p = _Fields({"rope_theta": f.float("rope_theta", default=10000.0), **given[0], **given[1]})
    kind = p.get("rope_type", "type", default="default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"rope_type {kind!r} is not supported; expected default, linear, llama3 or yarn")
    if dim % 2 or p.float("partial_rotary_factor", default=1.0) != 1:
        raise ConfigError(f"rotary embedding of a part of a head is not supported; found dimension {dim} and {p.raw}")
    positions = f.int("max_position_embeddings", default=4096)
    original = p.int("original_max_position_embeddings", default=positions)
    ratio = positions / original if kind == "yarn" and original < positions else None
    factor = 1.0 if kind == "default" else p.float("factor", default=ratio)
    attention_factor, gain = 1.0, 1.0
    if kind == "yarn":
        mscale, all_dim = p.float("mscale", default=0.0), p.float("mscale_all_dim", default=0.0)
        both = mscale and all_dim
        implied = _mscale(factor, mscale) / _mscale(factor, all_dim) if both else _mscale(factor)
        attention_factor = p.float("attention_factor", default=implied)
        gain = _mscale(factor, all_dim) ** 2 if family.startswith("deepseek") and all_dim else 1.0
    interleaved = family == "deepseek_v2" or (family == "deepseek_v3" and bool(f.get("rope_interleave", default=True)))
    rope = Rope(
        dim=dim,
        theta=p.float("rope_theta", default=10000.0),
        kind=kind,
        factor=factor,
        original_max_position=original,
        interleaved=interleaved,
        attention_factor=attention_factor,
        beta_fast=p.float("beta_fast", default=32.0),
        beta_slow=p.float("beta_slow", default=1.0),
        truncate=bool(p.get("truncate", default=True)),
        low_freq_factor=p.float("low_freq_factor", default=1.0),
        high_freq_factor=p.float("high_freq_factor", default=4.0),
    )
    return rope, gain


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. Rows are tokens of one rank in one step."""

    ranks: int = 1  # size of the mesh axis "expert"
    slots: int | None = None  # expert slots per layer and rank; None: the fewest that hold `replication` copies
    replication: int = 1
    page_size: int = 64  # tokens
    num_pages: int = 256  # per rank
    max_batch: int = 32  # running sequences per rank
    max_prefill_rows: int = 128  # prompt tokens in one step
    max_model_len: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation; weights keep the checkpoint's type if narrower
    deterministic: bool = True  # same bits whatever the batch and the mesh; design: "Same tokens, by construction"
    # "native": in C++, for a CPU; "hopper": Pallas; "reference": plain JAX; "auto": native or hopper, or else xla
    kernels: Literal["auto", "native", "hopper", "xla", "reference"] = "auto"
    prefix_caching: bool = True
    return_logits: bool = False  # steps also return float32 logits: for tests
    row_tile: int = field(default=16, repr=False)  # every dense product has this many rows, in every bucket
    expert_tile: int = field(default=8, repr=False)  # every expert's product has this many rows

    def __post_init__(self) -> None:
        positive = ("ranks", "page_size", "num_pages", "max_batch", "max_prefill_rows", "max_model_len", "replication")
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: expected a positive integer, found {value!r}")
        for name in ("max_batch", "max_prefill_rows"):
            if getattr(self, name) % self.row_tile:
                raise ConfigError(f"{name}: expected a multiple of {self.row_tile}, found {getattr(self, name)}")
        if self.kernels not in ("auto", "native", "hopper", "xla", "reference"):
            raise ConfigError(f"kernels: expected auto, native, hopper, xla or reference, found {self.kernels!r}")
        if self.slots is not None and (not isinstance(self.slots, int) or self.slots < 1):
            raise ConfigError(f"slots: expected a positive integer, found {self.slots!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype: expected float32 or bfloat16, found {self.dtype!r}")
        if self.replication > self.ranks:
            raise ConfigError(f"replication {self.replication} needs as many ranks, found {self.ranks}")

    @property
    def max_replicas(self) -> int:
        """Copies of an expert that the routing table has room for; a shape, so the same in every mesh."""
        return min(self.ranks, 4)

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def max_score_rows(self) -> int:
        """Tokens scored in one step: each gives a row as long as the vocabulary."""
        return min(self.max_prefill_rows, 512)

    def slots_for(self, num_experts: int) -> int:
        """Slots per layer and rank."""
        fewest = -(-num_experts * self.replication // self.ranks)
        if self.slots is None:
            return fewest
        if self.slots < fewest:
            raise ConfigError(
                f"slots {self.slots}: {num_experts} experts × {self.replication} need at least {fewest} a rank"
            )
        return self.slots

    @property
    def buckets(self) -> tuple["Bucket", ...]:
        """In the order in which ranks agree on them: a later one can hold whatever an earlier one holds."""
        decode = [self.row_tile]
        while decode[-1] < self.max_batch:
            decode.append(min(2 * decode[-1], self.max_batch))
        prefill = [min(self.max_prefill_rows, 2 * self.row_tile)]
        while prefill[-1] < self.max_prefill_rows:
            prefill.append(min(4 * prefill[-1], self.max_prefill_rows))
        score = Bucket(self.max_batch + self.max_score_rows, True, score=True)
        return (*(Bucket(r, False) for r in decode), *(Bucket(self.max_batch + r, True) for r in prefill), score)

    def bucket_for(self, rows: int, prefill: bool) -> "Bucket":
        """The first that holds so many rows, or the largest of its kind."""
        kind = [b for b in self.buckets if b.prefill == prefill and not b.score]
        return next((b for b in kind if b.rows >= rows), kind[-1])


@dataclass(frozen=True)
class Bucket:
    """A shape for which the step is compiled: `rows` per rank, and whether prompt tokens may be among them."""

    rows: int
    prefill: bool
    score: bool = False  # returns the log-probabilities of every row and samples nothing
