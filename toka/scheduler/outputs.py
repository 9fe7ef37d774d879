"""What a committed step brings to the clients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toka.messages import EngineStats, FinishReason, StepOutputs
from toka.plan import I32, I64


@dataclass(frozen=True, slots=True)
class TokenOutputs:
    """The tokens of one committed step, one entry each, as StepOutputs packs them; see there.

    request_ids int64, token_ids int32, finish uint8 (FinishReason), cached int32; all [D], to be read only.
    """

    request_ids: I64
    token_ids: I32
    finish: npt.NDArray[np.uint8]
    cached: I32

    def __len__(self) -> int:
        return len(self.request_ids)

    def pack(self, stats: EngineStats) -> StepOutputs:
        """As the message to the API process."""
        return StepOutputs(
            request_ids=self.request_ids.tobytes(),
            token_ids=self.token_ids.tobytes(),
            finish=self.finish.tobytes(),
            cached=self.cached.tobytes(),
            stats=stats,
        )


def ends_without_token(request_ids: list[int], reason: FinishReason) -> TokenOutputs:
    """These requests end for this reason before they drew anything."""
    num_ends = len(request_ids)
    return TokenOutputs(
        request_ids=np.array(request_ids, dtype=np.int64),
        token_ids=np.full(num_ends, -1, dtype=np.int32),
        finish=np.full(num_ends, reason, dtype=np.uint8),
        cached=np.zeros(num_ends, dtype=np.int32),
    )
