"""Train the demo model that ships inside the package, and export it as a Hugging Face `qwen3_moe` directory.

The model is small (7.4 M parameters) but a real mixture of experts: trained with load balancing, so that every expert
matters. Before it writes the model card the script proves that: it zeroes each expert in turn and measures how far the
logits move. Reads what `demo_corpus.py` wrote; knows nothing of the serving runtime.

    python scripts/train_demo.py --corpus .demo/corpus.bin --tokenizer .demo/tokenizer.json --out demo --minutes 5

Shapes are written with B batch, T time, H hidden, N/K query/key heads, D head width, E experts, I expert width,
L layers, V vocabulary. Layers are stacked along a leading L and scanned.
"""

import argparse
import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import safetensors.flax
from tokenizers import Tokenizer

Params = dict[str, Any]

PROMPTS = (
    "The capital of",
    "My fellow citizens,",
    "Once upon a time",
    "In Python, a list is",
    "It was a dark and stormy night, and",
    "<|im_start|>user\nWhat does the word ocean mean?<|im_end|>\n<|im_start|>assistant\n",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Field names are those of transformers' Qwen3MoeConfig, so that `config.json` is this plus constants."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    router_aux_loss_coef: float = 0.02


class TrainState(flax.struct.PyTreeNode):
    """Everything a checkpoint holds; `best` is the parameters with the lowest validation loss so far."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    best: Params
    best_loss: jax.Array


# The model.


def init_params(config: Config, rng: jax.Array) -> Params:
    """Float32 weights, normal with variance 1/fan_in; projections back into the residual stream start smaller."""
    c = config
    layers, hidden, width, experts = c.num_hidden_layers, c.hidden_size, c.moe_intermediate_size, c.num_experts
    q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    keys = iter(jax.random.split(rng, 9))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), shape) * scale / math.sqrt(shape[-2])

    residual = 1 / math.sqrt(2 * layers)
    return {
        "embed": jax.random.normal(next(keys), (c.vocab_size, hidden)) * 0.02,
        "final_norm": jnp.ones(hidden),
        "layers": {
            "attention_norm": jnp.ones((layers, hidden)),
            "q": normal(layers, hidden, q_width),
            "k": normal(layers, hidden, kv_width),
            "v": normal(layers, hidden, kv_width),
            "o": normal(layers, q_width, hidden, scale=residual),
            "q_norm": jnp.ones((layers, c.head_dim)),
            "k_norm": jnp.ones((layers, c.head_dim)),
            "moe_norm": jnp.ones((layers, hidden)),
            "router": normal(layers, hidden, experts, scale=0.1),  # start even, or experts die in the first steps
            "gate": normal(layers, experts, hidden, width),
            "up": normal(layers, experts, hidden, width),
            "down": normal(layers, experts, width, hidden, scale=residual),
        },
    }


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def rotary(x: jax.Array, theta: float) -> jax.Array:
    """Rotate the two halves of each head of x [B,T,N,D] by its position, as Hugging Face lays them out."""
    frequency = theta ** (-jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(layer: Params, x: jax.Array, config: Config, kernel: str) -> jax.Array:
    batch, length, _ = x.shape
    q, k, v = ((x @ layer[name]).reshape(batch, length, -1, config.head_dim) for name in "qkv")
    q = rotary(rms_norm(q, layer["q_norm"], config.rms_norm_eps), config.rope_theta)
    k = rotary(rms_norm(k, layer["k_norm"], config.rms_norm_eps), config.rope_theta)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)  # type: ignore[arg-type]
    return mixed.reshape(batch, length, -1) @ layer["o"]


def moe(layer: Params, x: jax.Array, config: Config) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Every expert runs on every token and the router's top-k weights, zero elsewhere, pick: at this size that is three
    dense products, faster than sorting tokens. Also returns each expert's share of the choices [E] and two losses."""
    logits = x.astype(jnp.float32) @ layer["router"].astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, config.num_experts_per_tok)
    weights /= weights.sum(-1, keepdims=True)
    picks = jax.nn.one_hot(chosen, config.num_experts)  # [B,T,k,E]
    combine = jnp.einsum("btk,btke->bte", weights, picks)

    hidden = jax.nn.silu(jnp.einsum("bth,ehi->btei", x, layer["gate"])) * jnp.einsum("bth,ehi->btei", x, layer["up"])
    out = jnp.einsum("btei,eih->bth", hidden * combine[..., None].astype(x.dtype), layer["down"])

    load = picks.mean((0, 1, 2))
    return out, {
        "load": load,
        "balance": config.num_experts * jnp.sum(load * probabilities.mean((0, 1))),  # Switch Transformer, eq. 4
        "z": jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2),  # ST-MoE, eq. 5
    }


def forward(
    params: Params,
    tokens: jax.Array,
    config: Config,
    *,
    dtype: jnp.dtype = jnp.float32,
    kernel: str = "xla",
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """tokens int[B,T] -> float32 logits [B,T,V] and the layers' routing statistics, stacked along L."""
    params = jax.tree.map(lambda w: w.astype(dtype), params)

    def drop(x: jax.Array, key: jax.Array | None) -> jax.Array:
        if key is None:
            return x
        return jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x / (1 - dropout), 0).astype(x.dtype)

    def block(x: jax.Array, scanned: tuple[Params, jax.Array | None]) -> tuple[jax.Array, dict[str, jax.Array]]:
        layer, keys = scanned
        first, second = (None, None) if keys is None else keys
        x += drop(attention(layer, rms_norm(x, layer["attention_norm"], config.rms_norm_eps), config, kernel), first)
        mixed, stats = moe(layer, rms_norm(x, layer["moe_norm"], config.rms_norm_eps), config)
        return x + drop(mixed, second), stats

    keys = None if rng is None or not dropout else jax.random.split(rng, (config.num_hidden_layers + 1, 2))
    x = drop(params["embed"][tokens], None if keys is None else keys[-1, 0])
    x, stats = jax.lax.scan(block, x, (params["layers"], None if keys is None else keys[:-1]))
    x = rms_norm(x, params["final_norm"], config.rms_norm_eps)
    logits = jnp.einsum("bth,vh->btv", x, params["embed"], preferred_element_type=jnp.float32)
    return logits, stats


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Training.


def learning_rate(step: jax.Array, progress: jax.Array, peak: float, warmup: int) -> jax.Array:
    """Linear warm-up by step, then a cosine to a hundredth by `progress`, the share of the run (steps or time) done."""
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return peak * jnp.minimum(1, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW without its learning rate, which depends on the progress of the run and is applied by `train_step`."""

    def decays(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(weight_decay, mask=decays),
    )


def make_train_step(args: argparse.Namespace, config: Config, kernel: str, dtype: jnp.dtype) -> Callable:
    optimizer = make_optimizer(args.weight_decay)

    def train_step(
        state: TrainState, corpus: jax.Array, starts: jax.Array, progress: jax.Array, length: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        window = corpus[starts[:, None] + jnp.arange(length + 1)].astype(jnp.int32)
        rng = jax.random.fold_in(jax.random.key(args.seed + 1), state.step)

        def loss_fn(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            logits, stats = forward(
                params, window[:, :-1], config, dtype=dtype, kernel=kernel, dropout=args.dropout, rng=rng
            )
            loss = cross_entropy(logits, window[:, 1:])
            auxiliary = config.router_aux_loss_coef * stats["balance"].mean() + args.z_loss * stats["z"].mean()
            return loss + auxiliary, {"loss": loss, "balance": stats["balance"].mean()}

        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = learning_rate(state.step, progress, args.learning_rate, args.warmup)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: -rate * u, updates))
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jax.jit(train_step, static_argnames="length", donate_argnums=0)


@jax.jit
def keep_best(state: TrainState, loss: jax.Array) -> TrainState:
    better = loss < state.best_loss
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.params, state.best)
    return state.replace(best=best, best_loss=jnp.minimum(loss, state.best_loss))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, tokens: int, length: int) -> np.ndarray:
    """Starts of an epoch's windows in random order; each epoch cuts the corpus at other places."""
    rng = np.random.default_rng((seed, epoch, length))
    starts = np.arange(rng.integers(length), tokens - length, length, dtype=np.int32)
    return rng.permutation(starts)


def batch_starts(step: int, batch: int, seed: int, tokens: int, length: int) -> np.ndarray:
    """The windows of a step: a pure function of the step, so that a resumed run sees the same data."""
    per_epoch = max(1, (tokens // length - 2) // batch)
    order = epoch_order(seed, step // per_epoch, tokens, length)
    first = step % per_epoch * batch
    return np.resize(order[first : first + batch], batch)


def make_evaluate(config: Config, kernel: str, dtype: jnp.dtype, batch: int) -> Callable:
    @jax.jit
    def run(params: Params, window: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, stats = forward(params, window[:, :-1], config, dtype=dtype, kernel=kernel)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])
        return losses.mean(-1), stats["load"]

    def evaluate(params: Params, windows: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean loss in nats a token, and each expert's share of the choices [L,E], over whole batches of windows."""
        losses, loads = [], []
        for start in range(0, len(windows) // batch * batch, batch):
            loss, load = run(params, jnp.asarray(windows[start : start + batch], jnp.int32))
            losses.append(np.asarray(loss))
            loads.append(np.asarray(load))
        return float(np.mean(losses)), np.mean(loads, axis=0)

    return evaluate


def cut_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    starts = np.arange(0, len(tokens) - length, length)
    return tokens[starts[:, None] + np.arange(length + 1)]


def attention_kernel(length: int, config: Config) -> str:
    """cuDNN's fused attention where it compiles and runs, else whatever XLA makes of the plain one."""
    if jax.default_backend() != "gpu":
        return "xla"
    q = jnp.ones((1, length, config.num_attention_heads, config.head_dim), jnp.bfloat16)
    k = jnp.ones((1, length, config.num_key_value_heads, config.head_dim), jnp.bfloat16)
    try:
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        jax.block_until_ready(jax.jit(jax.grad(lambda q: attend(q, k, k).astype(jnp.float32).sum()))(q))
    except Exception as error:  # its failures have no common type, and each only means: slower
        print(f"no cuDNN attention, using XLA's: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return "xla"
    return "cudnn"


@dataclasses.dataclass
class Run:
    """What the model card reports about a training run."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    device: str = ""
    dtype: str = ""
    history: list[tuple[int, int, float, float]] = dataclasses.field(default_factory=list)  # step, tokens, train, val


def train(args: argparse.Namespace, config: Config, corpus: np.ndarray, validation: np.ndarray) -> tuple[Params, Run]:
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    kernel = attention_kernel(args.length, config) if args.attention == "auto" else args.attention
    run = Run(device=jax.devices()[0].device_kind, dtype=jnp.dtype(dtype).name)
    print(f"device {run.device}, compute {run.dtype}, attention {kernel}", flush=True)

    @jax.jit
    def initial() -> TrainState:
        params = init_params(config, jax.random.key(args.seed))
        best = jax.tree.map(jnp.copy, params)
        opt_state = make_optimizer(args.weight_decay).init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, best, jnp.array(jnp.inf))

    state = initial()
    directory = args.checkpoint_dir.resolve()
    if not args.resume:
        shutil.rmtree(directory, ignore_errors=True)
    manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True))
    if args.resume and manager.latest_step() is not None:
        template = ocp.args.Composite(state=ocp.args.StandardRestore(state), run=ocp.args.JsonRestore())
        restored = manager.restore(manager.latest_step(), args=template)
        state = restored["state"]
        run = dataclasses.replace(run, **{k: restored["run"][k] for k in ("steps", "tokens", "seconds", "history")})
        print(f"resumed at step {run.steps}, {run.seconds:.0f} s", flush=True)

    def save() -> None:
        if manager.latest_step() == run.steps:
            return
        record = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(dataclasses.asdict(run)))
        manager.save(run.steps, args=record, force=True)
        manager.wait_until_finished()  # the next step reuses the buffers that are being written

    # Compile both lengths ahead, so that the clock below counts training alone.
    step_fn = make_train_step(args, config, kernel, dtype)
    device_corpus = jnp.asarray(corpus)
    tokens_per_step = args.batch * args.length
    batches = {length: max(1, tokens_per_step // length) for length in (args.length, args.long_length)}
    started = time.perf_counter()
    compiled = {
        length: step_fn.lower(  # type: ignore[attr-defined]
            state, device_corpus, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.float32), length=length
        ).compile()
        for length, batch in batches.items()
    }
    evaluate = make_evaluate(config, kernel, dtype, min(args.batch, len(validation)))
    print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)

    earlier, begun = run.seconds, time.perf_counter()
    reported, losses = (run.tokens, time.perf_counter()), []
    while True:
        run.seconds = earlier + time.perf_counter() - begun
        progress = run.steps / args.steps if args.steps else run.seconds / (60 * args.minutes)
        if progress >= 1:
            break
        length = args.length if progress < 1 - args.long_share else args.long_length
        starts = batch_starts(run.steps, batches[length], args.seed, len(corpus), length)
        state, metrics = compiled[length](state, device_corpus, jnp.asarray(starts), jnp.float32(progress))
        run.steps += 1
        run.tokens += batches[length] * length
        losses.append(metrics["loss"])
        if run.steps % 10 == 0:
            jax.block_until_ready(state)  # or the host would run ahead of the device, and the clock mean nothing
        if run.steps % args.eval_every == 0:
            train_loss = float(np.mean(jax.device_get(losses)))
            now = time.perf_counter()
            rate = (run.tokens - reported[0]) / (now - reported[1])
            validation_loss, load = evaluate(state.params, validation)
            state = keep_best(state, validation_loss)
            run.history.append((run.steps, run.tokens, train_loss, validation_loss))
            print(
                f"step {run.steps} {100 * progress:.1f}% length {length} train {train_loss:.4f} validation "
                f"{validation_loss:.4f} balance {float(metrics['balance']):.3f} load {100 * load.min():.1f}.."
                f"{100 * load.max():.1f}% {rate / 1e6:.3f} M tokens/s {1e3 * tokens_per_step / rate:.1f} ms/step",
                flush=True,
            )
            losses, reported = [], (run.tokens, time.perf_counter())
            if len(run.history) % args.save_every == 0:
                save()
    validation_loss, _ = evaluate(state.params, validation)
    state = keep_best(state, validation_loss)
    if losses:
        run.history.append((run.steps, run.tokens, float(np.mean(jax.device_get(losses))), validation_loss))
    save()
    manager.close()
    print(f"done: step {run.steps}, validation {validation_loss:.4f}, best {float(state.best_loss):.4f}", flush=True)
    return state.best, run


# Proving and exporting.


def weakest_expert(params: Params, tokens: np.ndarray, config: Config) -> np.ndarray:
    """max |change of a logit| over `tokens` int[B,T] when one expert is zeroed, for each [L,E]."""

    @jax.jit
    def logits(params: Params) -> jax.Array:
        return forward(params, jnp.asarray(tokens, jnp.int32), config)[0]

    @jax.jit
    def change(layer: jax.Array, expert: jax.Array, whole: jax.Array) -> jax.Array:
        down = params["layers"]["down"].at[layer, expert].set(0)
        return jnp.abs(logits(params | {"layers": params["layers"] | {"down": down}}) - whole).max()

    whole = logits(params)
    shape = (config.num_hidden_layers, config.num_experts)
    return np.array([change(*index, whole) for index in np.ndindex(shape)]).reshape(shape)


def generate(params: Params, tokenizer: Tokenizer, config: Config, new_tokens: int, seed: int = 0) -> list[str]:
    """Continue every prompt at temperature 0.7 among the 40 likeliest tokens, without a cache."""
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    buffer = np.zeros((len(prompts), max(map(len, prompts)) + new_tokens), np.int32)
    for row, ids in zip(buffer, prompts, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in prompts])
    done = np.zeros(len(prompts), bool)
    stops = [tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")]

    @jax.jit
    def sample(tokens: jax.Array, lengths: jax.Array, rng: jax.Array) -> jax.Array:
        logits = forward(params, tokens, config)[0][jnp.arange(len(prompts)), lengths - 1]
        values, indices = jax.lax.top_k(logits / 0.7, 40)
        return jnp.take_along_axis(indices, jax.random.categorical(rng, values)[:, None], axis=1)[:, 0]

    for i in range(new_tokens):
        rng = jax.random.fold_in(jax.random.key(seed), i)
        chosen = np.asarray(sample(jnp.asarray(buffer), jnp.asarray(lengths), rng))
        done |= np.isin(chosen, np.array(stops))
        buffer[np.flatnonzero(~done), lengths[~done]] = chosen[~done]
        lengths += ~done
    return [
        tokenizer.decode(row[start:end].tolist())
        for row, start, end in zip(buffer, map(len, prompts), lengths, strict=True)
    ]


def hugging_face_tensors(params: Params, config: Config) -> dict[str, jax.Array]:
    """The same weights under transformers' names, one tensor an expert, each [out, in]."""
    layers = params["layers"]
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = layers["attention_norm"][i]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = layers["moe_norm"][i]
        for name in "qkvo":
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = layers[name][i].T
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = layers[name][i]
        tensors[f"{prefix}.mlp.gate.weight"] = layers["router"][i].T
        for expert in range(config.num_experts):
            for name in ("gate", "up", "down"):
                tensors[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = layers[name][i, expert].T
    return {name: jnp.array(tensor, jnp.bfloat16) for name, tensor in tensors.items()}


def config_json(config: Config, end: int) -> dict[str, Any]:
    return dataclasses.asdict(config) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "eos_token_id": end,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": config.num_experts_per_tok * config.moe_intermediate_size,  # required, used by no layer
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "pad_token_id": end,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(out: Path, params: Params, config: Config, tokenizer: Tokenizer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    end, turn_end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    tensors = hugging_face_tensors(params, config)
    safetensors.flax.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", config_json(config, end or 0))
    write_json(
        out / "generation_config.json",
        {"do_sample": True, "temperature": 0.7, "top_k": 40, "eos_token_id": [end, turn_end], "pad_token_id": end},
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "model_max_length": config.max_position_embeddings,
            "pad_token": "<|endoftext|>",
        },
    )


def transformers_error(out: Path, params: Params, tokens: np.ndarray, config: Config) -> float:
    """max |change of a log-probability| between this file's forward and transformers' on the exported directory."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor(tokens.astype(np.int64))).logits, dim=-1).numpy()
    ours = jax.nn.log_softmax(forward(params, jnp.asarray(tokens, jnp.int32), config)[0], axis=-1)
    return float(np.abs(np.asarray(ours) - theirs).max())


def model_card(
    args: argparse.Namespace,
    config: Config,
    run: Run,
    corpus: dict[str, Any],
    *,
    size: int,
    parameters: int,
    loss: float,
    load: np.ndarray,
    changes: np.ndarray,
    samples: list[str],
) -> str:
    c = config
    idle = (c.num_experts - c.num_experts_per_tok) * c.num_hidden_layers * 3 * c.hidden_size * c.moe_intermediate_size
    sources = "\n".join(
        f"| {s['name']} | {s['client']} `{s['package']}` | {s['licence']} "
        f"| {s['train_tokens'] / 1e6:.2f} M | {s['copies']} |"
        for s in corpus["sources"]
    )
    every = max(1, len(run.history) // 10)
    shown = run.history[:-1][every - 1 :: every] + run.history[-1:]
    history = "\n".join(f"| {s} | {t / 1e6:.0f} M | {a:.3f} | {v:.3f} |" for s, t, a, v in shown)
    head = "| layer | " + " | ".join(map(str, range(c.num_experts))) + " |"
    rows = "\n".join(f"| {i} | " + " | ".join(f"{100 * x:.1f}" for x in row) + " |" for i, row in enumerate(load))
    texts = "\n\n".join(
        f"**{prompt}**{text}" if "<|" not in prompt else f"```\n{prompt}{text}\n```"
        for prompt, text in zip(PROMPTS, (t.replace("\n\n", " ").rstrip() for t in samples), strict=True)
    )
    return f"""# The demo model

A {parameters / 1e6:.2f} M parameter mixture-of-experts language model ({(parameters - idle) / 1e6:.2f} M active a \
token), small enough to ship inside the package and to run on a CPU. It exists to show and test serving: expect \
readable English sentences, not facts.

`qwen3_moe`: {c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} query and \
{c.num_key_value_heads} key-value heads of {c.head_dim}, {c.num_experts} experts of {c.moe_intermediate_size} with top-\
{c.num_experts_per_tok} routing, vocabulary {c.vocab_size} (byte-level BPE), tied embeddings; {size:,} bytes in \
bfloat16.

## Training

| | |
| --- | --- |
| steps | {run.steps} |
| tokens seen | {run.tokens / 1e6:.0f} M: {run.tokens / corpus["train_tokens"]:.1f} passes over \
{corpus["train_tokens"] / 1e6:.1f} M, {corpus["unique_train_tokens"] / 1e6:.1f} M of them distinct |
| time | {run.seconds:.0f} s on one {run.device}, {run.tokens / run.seconds / 1e6:.3f} M tokens/s, \
{run.dtype} compute, float32 weights |
| batch | {args.batch} × {args.length} tokens; {args.long_length} long in the last {100 * args.long_share:.0f}% |
| optimiser | AdamW, peak {args.learning_rate}, {args.warmup} steps of warm-up, cosine; \
weight decay {args.weight_decay}, dropout {args.dropout} |
| routing losses | balance {c.router_aux_loss_coef}, z {args.z_loss} |

| step | tokens | training loss | validation loss |
| --- | --- | --- | --- |
{history}

The exported weights, rounded to bfloat16 and run in float32, reach **{loss:.3f} nats a token, perplexity \
{math.exp(loss):.2f}**, on {corpus["validation_tokens"] / 1e3:.0f} k tokens of held-out documents \
({loss / math.log(2) / corpus["characters_per_token"]:.2f} bits a character).

## Every expert matters

Share of the router's choices on held-out text, per cent (even would be {100 / c.num_experts:.2f}):

{head}
|{" --- |" * (c.num_experts + 1)}
{rows}

Zeroing any single expert of any layer moves some logit of a held-out batch by at least **{changes.min():.3f}** \
(median {np.median(changes):.3f}), so a lost expert cannot go unnoticed.

## Samples

Temperature 0.7, top-k 40.

{texts}

## Data and licences

Built by `scripts/demo_corpus.py`; each licence permits passing on a model made from the text. A third of the WordNet \
entries and a tenth of the other texts are written as chats.

| text | package | licence | tokens | copies |
| --- | --- | --- | --- | --- |
{sources}

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. It is provided "as is", without warranty.

## Limits

It knows next to nothing, invents facts fluently, repeats the opinions and prejudices of texts from 1790 to today, \
follows no instructions beyond "What does the word ... mean?" and "Continue: ...", and was trained on windows of at \
most {max(args.length, args.long_length)} tokens. Do not use it for anything but demonstration and tests.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(".demo/corpus.bin"), help="with its .json beside it")
    parser.add_argument("--tokenizer", type=Path, default=Path(".demo/tokenizer.json"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint-dir", type=Path, default=Path(".demo/checkpoints"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="training time; compiling and exporting come on top")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=128, help="windows of --length a step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--long-length", type=int, default=2048)
    parser.add_argument("--long-share", type=float, default=0.15, help="share of the run at --long-length, at its end")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.5, help="high, as the text is seen many times")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--balance-loss", type=float, default=Config.router_aux_loss_coef)
    parser.add_argument("--z-loss", type=float, default=1e-3)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=4, help="checkpoint each so many evaluations")
    parser.add_argument("--eval-windows", type=int, help="only the first so many validation windows")
    parser.add_argument("--sample-tokens", type=int, default=100)
    parser.add_argument("--attention", choices=("auto", "cudnn", "xla"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare the export with transformers")
    args = parser.parse_args()
    jax.config.update("jax_default_prng_impl", "rbg")  # dropout masks at a fraction of threefry's cost

    config = Config(router_aux_loss_coef=args.balance_loss)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(f"{args.tokenizer} has {tokenizer.get_vocab_size()} tokens, the model {config.vocab_size}")
    summary = json.loads(args.corpus.with_suffix(".json").read_text())
    tokens = np.fromfile(args.corpus, np.uint16)
    validation = cut_windows(tokens[: summary["validation_tokens"]], args.length)[: args.eval_windows]
    params, run = train(args, config, tokens[summary["validation_tokens"] :], validation)

    # From here on the weights are the exported ones, and products are exact enough to compare.
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        export(args.out, params, config, tokenizer)
        loss, load = make_evaluate(config, "xla", jnp.float32, min(32, len(validation)))(params, validation)
        changes = weakest_expert(params, validation[:8, :-1], config)
        samples = generate(params, tokenizer, config, args.sample_tokens)
        card = model_card(
            args, config, run, summary,
            size=(args.out / "model.safetensors").stat().st_size,
            parameters=sum(w.size for w in jax.tree.leaves(params)),
            loss=loss, load=load, changes=changes, samples=samples,
        )  # fmt: skip
        (args.out / "README.md").write_text(card)
        print(card)
        print(f"weakest expert: some logit moves by {changes.min():.4f} (must exceed 0.01)")
        if args.check:
            error = transformers_error(args.out, params, validation[:2, :-1], config)
            print(f"largest difference of a log-probability from transformers: {error:.2e} (must stay under 1e-3)")
            if error >= 1e-3:
                raise SystemExit("the export does not mean what was trained")
    if changes.min() <= 1e-2:
        layer, expert = np.unravel_index(changes.argmin(), changes.shape)
        raise SystemExit(f"expert {expert} of layer {layer} hardly matters; train longer or balance harder")


if __name__ == "__main__":
    main()
