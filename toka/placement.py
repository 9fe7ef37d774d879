"""How a tensor is spread over the ranks of one mesh axis: value types and the lookup in a model's table (floor 1, no torch).

A model states a placement per weight and axis and never learns its rank; the compiler's SPMD pass does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the whole tensor."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of the axis holds an equal, contiguous piece along the tensor dim `dim`."""

    dim: int


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank of the axis holds a tensor of the full shape; the value meant is their sum."""


Placement = Replicate | Shard | Partial
AxisPlacements = Mapping[str, Placement]
"""Mesh axis → placement. Axes that are not mentioned replicate."""
PlacementTable = Mapping[str, AxisPlacements]
"""Weight name pattern (`*` as in a shell) → its placements."""


def placements_of(table: PlacementTable, weight: str) -> AxisPlacements:
    """The placements of a weight. Raises KeyError unless exactly one pattern of the table matches the name."""
    matches = [pattern for pattern in table if fnmatchcase(weight, pattern)]
    if len(matches) != 1:
        raise KeyError(f"{weight} must match one pattern of the placement table, it matches {matches}")
    return table[matches[0]]


def placement_of(table: PlacementTable, weight: str, axis: str) -> Placement:
    """The placement of a weight along a mesh axis. Raises KeyError unless exactly one pattern of the table matches the name."""
    return placements_of(table, weight).get(axis, Replicate())
