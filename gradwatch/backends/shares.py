"""What each rank of a training adds to the numbers of the whole. Numpy only.

Every rank describes the parameters that it holds; from the descriptions of all ranks each one makes the same `Union`:
the columns of the whole, and which of them this rank adds its part to. A sum over the ranks then counts every element
of every gradient once: shards are added up, of copies one counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.records import NOT_MEASURED, Floats, Parameter

#: Sampled statistics that are made of sums over the elements; `grad_max` is a maximum.
SUMMED = ("weight_norm", "update_ratio", "zero_fraction", "nonfinite_count")

#: Added to each term, so that a sum of zeros differs from nothing: far below the square of the least float32.
SEEN = 1e-300


@dataclass(frozen=True)
class Holding:
    """How a rank holds one parameter.

    Args:
        ranks: The ranks whose parts make up one copy of it, this rank among them.
        shape: Of the whole.
        fingerprint: Of weights that nothing is known to keep equal between the ranks; None where something is. Equal
            ones are copies; different ones are parameters of their own (experts).
    """

    ranks: tuple[int, ...]
    shape: tuple[int, ...] = ()
    fingerprint: float | None = None


def describe_rank(parameters: Sequence[Parameter], holdings: Sequence[Holding], **facts: Any) -> dict[str, Any]:
    """A rank's parameters as JSON types, with further facts."""
    return {**facts, "parameters": [asdict(p) for p in parameters], "holdings": [asdict(h) for h in holdings]}


class Union:
    """The parameters of all ranks.

    Args:
        descriptions: Of `describe_rank`, rank by rank.
        rank: This rank.
    """

    def __init__(self, descriptions: Sequence[Mapping[str, Any]], rank: int) -> None:
        holders: dict[str, dict[int, Holding]] = {}
        described: dict[str, Parameter] = {}
        for number, description in enumerate(descriptions):
            depth = 1 + max((p.depth for p in described.values()), default=-1)
            known = set(described)
            for fields, held in zip(description["parameters"], description["holdings"], strict=True):
                holding = Holding(tuple(held["ranks"]), tuple(held["shape"]), held["fingerprint"])
                name = fields["name"]
                if name not in known:
                    # Stages of a pipeline follow each other.
                    changed = {"depth": fields["depth"] + depth, "aliases": tuple(fields["aliases"])}
                    described[name] = Parameter(**{**fields, **changed, "shape": holding.shape})
                holders.setdefault(name, {})[number] = holding
        self.parameters = list(described.values())
        mine = [fields["name"] for fields in descriptions[rank]["parameters"]]
        column = {name: place for place, name in enumerate(described)}
        self.columns = np.array([column[name] for name in mine], np.intp)
        self.adds = np.array([_adds(holders[name], rank) for name in mine], bool)
        self.may_be_partial = any(description.get("may_be_partial") for description in descriptions)
        self.is_needed = any(_is_spread(each, len(descriptions)) for each in holders.values())

    def __len__(self) -> int:
        return len(self.parameters)

    def spread(self, terms: Any, norms: Any) -> npt.NDArray[np.float64]:
        """This rank's terms of the sums at the columns of the whole; nothing where nothing was measured.

        Args:
            terms: Of this rank's parts, shape (this rank's parameters or fewer,).
            norms: What says by `NOT_MEASURED` where nothing was measured, of the same shape.
        """
        count = min(len(norms), len(self.columns))
        measured = (norms[:count] != NOT_MEASURED) & self.adds[:count]
        sums = np.zeros(len(self))
        sums[self.columns[:count]] = np.where(measured, np.asarray(terms)[:count] + SEEN, 0.0)
        return sums


def totals(sums: Floats) -> npt.NDArray[np.float64]:
    """What the terms of all ranks add up to; `NOT_MEASURED` where no rank measured."""
    return np.where(sums == 0.0, NOT_MEASURED, sums)


def roots(sums: Floats) -> npt.NDArray[np.float32]:
    """Norms from sums of squares; `NOT_MEASURED` where no rank measured."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(sums == 0.0, NOT_MEASURED, np.sqrt(sums)).astype(np.float32)


def _adds(holders: Mapping[int, Holding], rank: int) -> bool:
    """Whether this rank's part counts: it belongs to the first copy, or is a parameter of its own."""
    marks = {holding.fingerprint for holding in holders.values()}
    if None not in marks and len(marks) > 1:
        return True
    return holders[rank].ranks == holders[min(holders)].ranks


def _is_spread(holders: Mapping[int, Holding], world_size: int) -> bool:
    """Whether the first rank alone cannot know the norm."""
    if 0 not in holders or len(holders[0].ranks) > 1:
        return True
    return len({holding.fingerprint for holding in holders.values()}) > 1
