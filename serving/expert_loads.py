"""How many tokens each expert was given, as engines counted them: recent ones count more."""

from __future__ import annotations

import numpy as np


class ExpertLoads:
    """A sum that decays: what was counted half_life seconds ago counts half. Time is an argument."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._at = 0.0
        self.tokens = np.zeros((0, 0))  # float64 [layers, experts]; empty before anything was counted
        self.version = 0  # grows with every change

    def add(self, counts: np.ndarray, now: float) -> None:
        """counts [layers, experts], of one engine since the last time."""
        before = np.zeros(counts.shape) if self.tokens.shape != counts.shape else self.tokens
        self.tokens = before * 0.5 ** ((now - self._at) / self._half_life) + counts
        self._at = now
        self.version += 1

    def known(self, enough: float) -> np.ndarray | None:
        """`tokens`, once experts were given at least so many in the mean: below that chance looks like load."""
        return self.tokens if self.tokens.size and self.tokens.mean() >= enough else None
