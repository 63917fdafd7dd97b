"""Loads of experts, float64 [layers, experts] in tokens or any unit: drawn, or measured and read from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LOADS = ("equal", "uniform", "zipf", "lognormal")


def make_load(kind: str, num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Load [layers, experts], every layer drawn or shuffled on its own. kind: one of LOADS."""
    random, shape = np.random.default_rng(seed), (num_layers, num_experts)
    match kind:
        case "equal":
            return np.ones(shape)
        case "uniform":
            return random.random(shape)
        case "zipf":
            return random.permuted(np.tile(1 / np.arange(1, num_experts + 1), (num_layers, 1)), axis=1)
        case "lognormal":
            return random.lognormal(size=shape)
    raise ValueError(f"load: found {kind!r}, expected one of {LOADS}")


def read_load(path: Path) -> np.ndarray:
    """Load [layers, experts] of a file: .npy, .json (a list for each layer, or an object with such a "load"), or text
    with a line for each layer, numbers divided by commas or blanks.

    Raises ValueError for what is none of these, OSError for what cannot be read.
    """
    try:
        if path.suffix == ".npy":
            load = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            read = json.loads(path.read_text())
            load = np.asarray(read["load"] if isinstance(read, dict) else read, np.float64)
        else:
            lines = path.read_text().replace(",", " ").splitlines()
            load = np.asarray([[float(word) for word in line.split()] for line in lines if line.strip()])
        load = np.asarray(load, np.float64)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: expected numbers [layers, experts] as .npy, .json or text: {e}") from None
    if load.ndim != 2 or not load.size:
        raise ValueError(f"{path}: found an array of shape {load.shape}, expected [layers, experts]")
    return load
