"""What a committed step brings to the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from toka.messages import EngineStats, FinishReason, StepOutputs, TokenScores
from toka.plan import F32, I32, I64


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Logprobs of L tokens, as TokenScores packs them; see there.

    request_ids int64, token_ids int32, logprobs float32, ranks int32 [L]; top_ids int32, top_logprobs float32 [L, width].
    """

    request_ids: I64
    token_ids: I32
    logprobs: F32
    ranks: I32
    top_ids: I32
    top_logprobs: F32
    width: int

    def pack(self) -> TokenScores:
        """As a part of the message to the API process."""
        return TokenScores(
            request_ids=self.request_ids.tobytes(),
            token_ids=self.token_ids.tobytes(),
            logprobs=self.logprobs.tobytes(),
            ranks=self.ranks.tobytes(),
            top_ids=self.top_ids.tobytes(),
            top_logprobs=self.top_logprobs.tobytes(),
            width=self.width,
        )


@dataclass(frozen=True, slots=True)
class TokenOutputs:
    """The tokens of one committed step, one entry each, as StepOutputs packs them; see there.

    request_ids int64, token_ids int32, finish uint8 (FinishReason), cached int32; all [D], to be read only.
    begun: (request id, time.perf_counter()) of requests of which the first step was planned meanwhile. vectors float32 [D, width], where
    the engine pools.
    """

    request_ids: I64
    token_ids: I32
    finish: npt.NDArray[np.uint8]
    cached: I32
    scores: ScoredTokens | None = None
    prompt_scores: ScoredTokens | None = None
    begun: tuple[tuple[int, float], ...] = ()
    vectors: F32 | None = None

    def __len__(self) -> int:
        return len(self.request_ids)

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return len(self) > 0 or self.prompt_scores is not None or bool(self.begun)

    def plus(self, entries: Sequence[tuple[int, int, FinishReason]]) -> TokenOutputs:
        """With these (request id, token id, finish) behind the others; of requests that have had an entry before."""
        request_ids, token_ids, finish = zip(*entries, strict=True)
        return replace(
            self,
            request_ids=np.concatenate((self.request_ids, np.array(request_ids, dtype=np.int64))),
            token_ids=np.concatenate((self.token_ids, np.array(token_ids, dtype=np.int32))),
            finish=np.concatenate((self.finish, np.array(finish, dtype=np.uint8))),
            cached=np.concatenate((self.cached, np.zeros(len(entries), dtype=np.int32))),
        )

    def pack(self, stats: EngineStats) -> StepOutputs:
        """As the message to the API process."""
        return StepOutputs(
            request_ids=self.request_ids.tobytes(),
            token_ids=self.token_ids.tobytes(),
            finish=self.finish.tobytes(),
            cached=self.cached.tobytes(),
            stats=stats,
            begun=np.array([request_id for request_id, _ in self.begun], dtype="<i8").tobytes(),
            begun_s=np.array([at_s for _, at_s in self.begun], dtype="<f8").tobytes(),
            scores=None if self.scores is None else self.scores.pack(),
            prompt_scores=None if self.prompt_scores is None else self.prompt_scores.pack(),
            vectors=b"" if self.vectors is None else self.vectors.tobytes(),
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


NOBODY_ENDS = ends_without_token([], FinishReason.NONE)
