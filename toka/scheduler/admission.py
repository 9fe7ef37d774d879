"""Which waiting request may begin: the policy, apart from the mechanism.

The scheduler asks about one request at a time, the head of the queue (lowest priority number, then earliest arrival),
and stops at the first no. So nobody is overtaken by a request behind it, and a policy that says yes once enough blocks
are free starves nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Load:
    """What the pool holds at the moment of the question. num_running: requests that run, the draining ones not counted."""

    num_running: int
    num_free_blocks: int


class AdmissionPolicy(Protocol):
    """Says whether the head of the queue may begin."""

    def admits(self, num_blocks_needed: int, load: Load) -> bool:
        """num_blocks_needed: free blocks that its first tokens would take, shared ones that others hold not counted.

        Who admits a number of blocks admits any smaller one under the same load.
        """
        ...


@dataclass(frozen=True, slots=True)
class AdmitWhenFree:
    """Admit when the blocks are there, and while anything runs leave a few for its growth."""

    watermark_blocks: int

    def admits(self, num_blocks_needed: int, load: Load) -> bool:
        reserve = self.watermark_blocks if load.num_running else 0
        return num_blocks_needed + reserve <= load.num_free_blocks
