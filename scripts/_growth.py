"""Whether processes grow: what was measured of each after every fault, looked at by process and by age.

One measurement says little, for what an engine has loaded differs by the moment. So medians of several are compared,
and of engines, which faults and drains replace, also those that had lived through many faults with those that were new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from statistics import median

from _cluster import Resources

from serving.recycling import EPOCHS

EARLY = 10  # the fault after which nothing shall grow
WINDOW = 5  # measurements, one a fault, of which the median counts
MEMORY = 16, 0.05  # MiB and share: growth beyond both is none of chance
THREADS = 4
AGES = (1, 3, 6, 11, 21, 41)  # classes begin with these: faults that an engine has lived through
DEFINITION = (
    f"Flat: the median of the last {WINDOW} measurements, one a fault, is above that of the {WINDOW} up to the "
    f"{EARLY}th by at most {MEMORY[1]:.0%} or {MEMORY[0]} MiB, and by at most {THREADS} threads. Sockets are bounded: "
    f"an engine is replaced after {EPOCHS} epochs, each of which costs it at most one for every other rank."
)

_AMOUNTS = ("memory", "threads", "sockets")

Samples = Mapping[int, Mapping[str, Resources]]
"""By number of faults until then, what each process had, by its role."""


@dataclass(frozen=True)
class Amounts:
    """memory: MiB."""

    memory: float
    threads: float
    sockets: float


@dataclass(frozen=True)
class Growth:
    """early, late: medians. most: each amount's greatest, at any time."""

    early: Amounts
    late: Amounts
    most: Amounts

    @property
    def flat(self) -> bool:
        grown = self.late.memory - self.early.memory
        threads = self.late.threads - self.early.threads
        return grown <= max(MEMORY[0], MEMORY[1] * self.early.memory) and threads <= THREADS

    def row(self) -> list[str]:
        """memory, threads, sockets, each as "early → late, at most", and the verdict."""
        each = [
            f"{getattr(self.early, name):.0f} → {getattr(self.late, name):.0f}, ≤ {getattr(self.most, name):.0f}"
            for name in _AMOUNTS
        ]
        return [*each, "yes" if self.flat else "NO"]

    @staticmethod
    def of(fields: Mapping[str, Mapping[str, float]]) -> Growth:
        """What `dataclasses.asdict` made of one."""
        return Growth(**{name: Amounts(**amounts) for name, amounts in fields.items()})


def by_process(samples: Samples) -> dict[str, Growth]:
    """Of each role, whoever had it. Nothing where fewer faults than two windows say nothing."""
    numbers = sorted(samples)
    if len(numbers) < 2 * WINDOW:
        return {}
    early, late = _ends(numbers)
    growths = {}
    for role in samples[late[-1]]:
        before, after, always = (
            [samples[n][role] for n in some if role in samples[n]] for some in (early, late, numbers)
        )
        if before:
            growths[role] = Growth(medians(before), medians(after), _most(always))
    return growths


def _ends(numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The last window, and one before it that ends with EARLY, or sooner or later where there are few."""
    until = max(sum(n <= EARLY for n in numbers[:-WINDOW]), WINDOW)
    return numbers[until - WINDOW : until], numbers[-WINDOW:]


def by_age(samples: Samples) -> dict[tuple[int, int], list[Resources]]:
    """What engines had that had lived through so many faults, least and most."""
    born: dict[int, int] = {}  # by process id: the number of the measurement that was its first
    aged: list[tuple[int, Resources]] = []
    for count, number in enumerate(sorted(samples)):
        for role, found in samples[number].items():
            if role.startswith("engine"):
                aged.append((count - born.setdefault(found.pid, count), found))
    classes: dict[tuple[int, int], list[Resources]] = {}
    for least, beyond in pairwise((*AGES, 1 << 30)):
        members = [(age, found) for age, found in aged if least <= age < beyond]
        if members:
            classes[least, max(age for age, _ in members)] = [found for _, found in members]
    return classes


def with_age(classes: Mapping[tuple[int, int], Sequence[Resources]]) -> Growth | None:
    """From the youngest class to the oldest of which there are enough measurements. None: there are no two."""
    enough = [found for _, found in sorted(classes.items()) if len(found) >= WINDOW]
    if len(enough) < 2:
        return None
    return Growth(medians(enough[0]), medians(enough[-1]), _most(list(chain(*enough))))


def medians(found: Sequence[Resources]) -> Amounts:
    return Amounts(*(median(getattr(r, name) for r in found) for name in _AMOUNTS))


def _most(found: Sequence[Resources]) -> Amounts:
    return Amounts(*(max(getattr(r, name) for r in found) for name in _AMOUNTS))
