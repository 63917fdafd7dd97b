"""Whether processes grow: what was measured of each after every fault, looked at by process and by age.

One measurement says little, for what an engine has loaded differs by the moment. So medians of several are compared,
and of engines, which faults and drains replace, also those that had lived through many faults with those that were new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
            for name in ("memory", "threads", "sockets")
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
            growths[role] = Growth(_median(before), _median(after), _most(always))
    return growths


def _ends(numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The last window, and one before it that ends with EARLY, or sooner or later where there are few."""
    until = max(sum(n <= EARLY for n in numbers[:-WINDOW]), WINDOW)
    return numbers[until - WINDOW : until], numbers[-WINDOW:]


def by_age(samples: Samples) -> dict[tuple[int, int], tuple[int, Amounts]]:
    """Of engines that had lived through so many faults, least and most: how many measurements, and their median."""
    born: dict[int, int] = {}
    ages: dict[int, list[Resources]] = {}
    for count, number in enumerate(sorted(samples)):
        for role, found in samples[number].items():
            if role.startswith("engine"):
                age = count - born.setdefault(found.pid, count)
                ages.setdefault(age, []).append(found)
    classes: dict[tuple[int, int], tuple[int, Amounts]] = {}
    for least, beyond in pairwise((*AGES, 1 << 30)):
        members = [r for age, rs in ages.items() if least <= age < beyond for r in rs]
        if members:
            classes[least, max(age for age in ages if age < beyond)] = len(members), _median(members)
    return classes


def grown_with_age(classes: Mapping[tuple[int, int], tuple[int, Amounts]]) -> Growth | None:
    """The youngest class against the oldest of which there are enough measurements. None: there are no two."""
    enough = [amounts for _, (count, amounts) in sorted(classes.items()) if count >= WINDOW]
    if len(enough) < 2:
        return None
    return Growth(enough[0], enough[-1], _most(enough))


def _median(found: Sequence[Resources]) -> Amounts:
    return Amounts(*(median(getattr(r, name) for r in found) for name in ("memory", "threads", "sockets")))


def _most(found: Sequence[Resources | Amounts]) -> Amounts:
    return Amounts(*(max(getattr(r, name) for r in found) for name in ("memory", "threads", "sockets")))
