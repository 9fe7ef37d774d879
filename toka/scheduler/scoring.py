"""Which logprobs a step is asked for, and whose they are when they come back.

A drawn token's logprob belongs to the row that draws it. A prompt is scored chunk by chunk: the logits of each of its tokens but the
last say how likely the next one was. Nothing is drawn for such a place, so all there is to keep is whose it is.

Legend: D tokens drawn by a step, P places of prompts that it scores, L tokens that are handed up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toka.plan import I32, I64, Scoring, StepLogprobs
from toka.scheduler.outputs import ScoredTokens
from toka.scheduler.request_table import RequestTable, Rows

if TYPE_CHECKING:
    from toka.scheduler.batching import Chunk

_NO_I32 = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class ScoringInFlight:
    """What commit must know of a plan's Scoring.

    width: likeliest tokens that whoever asks for most wants. drawn: intp, places among the D drawn tokens of those that are scored.
    rows intp, generations int32, targets int32 [P]: of every place of a prompt, as they were when planned.
    """

    width: int
    drawn: Rows
    rows: Rows
    request_ids: I64
    generations: I32
    targets: I32

    def of_drawn(
        self, found: StepLogprobs, request_ids: I64, sampled: I32, wanted: npt.NDArray[np.bool_] | None
    ) -> ScoredTokens | None:
        """The drawn tokens that asked; None if there is none. request_ids, sampled [D]; wanted bool [D]: who still is; None = all."""
        drawn = self.drawn if wanted is None else self.drawn[wanted[self.drawn]]
        return self._cut(found, drawn, request_ids[drawn], sampled[drawn])

    def of_prompts(self, found: StepLogprobs, num_drawn: int, table: RequestTable) -> ScoredTokens | None:
        """The tokens of prompts whose requests are still wanted; None if there is none."""
        kept = np.flatnonzero(table.generation.take(self.rows) == self.generations)
        return self._cut(found, num_drawn + kept, self.request_ids[kept], self.targets[kept])

    def _cut(self, found: StepLogprobs, places: Rows, request_ids: I64, token_ids: I32) -> ScoredTokens | None:
        if not len(places):
            return None
        return ScoredTokens(
            request_ids=request_ids,
            token_ids=token_ids,
            logprobs=found.logprobs[places],
            ranks=found.ranks[places],
            top_ids=found.top_ids[places, : self.width],
            top_logprobs=found.top_logprobs[places, : self.width],
            width=self.width,
        )


def plan_scoring(
    drawn_rows: Rows, chunks: list[Chunk], first_tokens: I32, table: RequestTable
) -> tuple[Scoring, ScoringInFlight] | tuple[None, None]:
    """What a step has to score, twice: for the device and for commit; None if nobody asks.

    drawn_rows: rows that draw, in order. first_tokens: int32, where each of the chunks begins among the step's tokens.
    """
    num_logprobs = table.num_logprobs[drawn_rows]
    scored = [(chunk, first) for chunk, first in zip(chunks, first_tokens.tolist(), strict=True) if chunk.num_scored]
    if not scored and num_logprobs.max(initial=-1) < 0:
        return None, None
    asks = num_logprobs >= 0
    widths = [int(num_logprobs.max(initial=0)), *(int(table.num_prompt_logprobs[chunk.row]) for chunk, _ in scored)]
    rows = np.array([chunk.row for chunk, _ in scored], dtype=np.intp).repeat([chunk.num_scored for chunk, _ in scored])
    places = [first + np.arange(c.score_start - c.start, c.score_stop - c.start) for c, first in scored]
    targets = [table.tokens[c.row, c.score_start + 1 : c.score_stop + 1] for c, _ in scored]
    scoring = Scoring(
        drawn=asks,
        places=np.concatenate((_NO_I32, *places)).astype(np.int32),
        targets=np.concatenate((_NO_I32, *targets)),
    )
    in_flight = ScoringInFlight(
        width=max(widths),
        drawn=np.flatnonzero(asks),
        rows=rows,
        request_ids=table.request_id[rows],
        generations=table.generation[rows],
        targets=scoring.targets,
    )
    return scoring, in_flight
