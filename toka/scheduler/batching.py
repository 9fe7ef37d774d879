"""What goes into one step: rows that decode, kept as ready arrays from step to step, and chunks of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from toka.plan import I32, I64, Adjusting, AdjustmentSettings, MaskedDraws, Scoring
from toka.scheduler.request_table import RequestTable, Rows
from toka.scheduler.scoring import ScoringInFlight, plan_scoring

_NO_I32 = np.empty(0, dtype=np.int32)


class DecodeSet:
    """The rows that compute one token a step, with every array of a step that depends on nothing else.

    While no request begins or ends, a step's plan is made of these same arrays; nobody may write to them. R rows:
    rows intp, rows_i32 int32; token_ids int32: -1 - row, the token each row drew last; query_start int32 [R + 1];
    samples bool, all True; request_ids int64; num_cached_tokens, generations int32;
    final_seq_lens int32: the seq_len of the step in which each row draws its last token.
    scoring, scoring_in_flight: see scoring.py; None if none of the rows asks for logprobs. masked: None if no row has a grammar.
    adjusting: None if no row's logits are adjusted.
    """

    __slots__ = (
        "adjusting",
        "final_seq_lens",
        "generations",
        "masked",
        "num_cached_tokens",
        "query_start",
        "request_ids",
        "rows",
        "rows_i32",
        "samples",
        "scoring",
        "scoring_in_flight",
        "token_ids",
    )

    def __init__(self, rows: Rows, table: RequestTable):
        self.rows = rows
        self.rows_i32: I32 = rows.astype(np.int32)
        self.token_ids: I32 = -1 - self.rows_i32
        self.query_start: I32 = np.arange(len(rows) + 1, dtype=np.int32)
        self.samples: npt.NDArray[np.bool_] = np.ones(len(rows), dtype=np.bool_)
        self.request_ids: I64 = table.request_id[rows]
        self.num_cached_tokens: I32 = table.num_cached_tokens[rows]
        self.generations: I32 = table.generation[rows]
        self.final_seq_lens: I32 = table.max_total_tokens[rows] - np.int32(1)
        self.scoring: Scoring | None
        self.scoring_in_flight: ScoringInFlight | None
        self.scoring, self.scoring_in_flight = plan_scoring(rows, [], _NO_I32, table)
        self.masked = masked_draws(rows, table)
        self.adjusting = adjusting(rows, rows, table)

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, kept: npt.NDArray[np.bool_], table: RequestTable) -> DecodeSet:
        """The rows where kept (bool [R]) holds, in the same order."""
        return self if kept.all() else DecodeSet(self.rows[kept], table)

    def without(self, rows: list[int], table: RequestTable) -> DecodeSet:
        """All but these rows; such as are not in it are ignored."""
        return self.keep(~np.isin(self.rows, rows), table)

    def plus(self, rows: list[int], table: RequestTable) -> DecodeSet:
        """With these rows at the end."""
        return DecodeSet(np.concatenate((self.rows, np.array(rows, dtype=np.intp))), table) if rows else self


def masked_draws(drawn_rows: Rows, table: RequestTable) -> MaskedDraws | None:
    """Which of the tokens that these rows draw are masked; None if none is."""
    masked = table.has_grammar[drawn_rows]
    return MaskedDraws(masked, table.request_id[drawn_rows[masked]]) if masked.any() else None


def adjusting(
    drawn_rows: Rows, token_rows: Rows, table: RequestTable, settings: AdjustmentSettings | None = None
) -> Adjusting | None:
    """Which of these rows that draw, and of the rows of the batch's tokens, have their logits adjusted; None if none has."""
    places = np.flatnonzero(table.is_adjusted[token_rows])
    if not len(places):
        return None
    return Adjusting(table.is_adjusted[drawn_rows], places.astype(np.int32), settings)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. stop - 1 of a prefilling row, computed in this step; last: they are the last ones; draws: a token is drawn after
    them. score_start .. score_stop - 1: places among them at which the next token of the prompt is scored."""

    row: int
    start: int
    stop: int
    last: bool
    draws: bool
    score_start: int = 0
    score_stop: int = 0

    @property
    def num_scored(self) -> int:
        return self.score_stop - self.score_start

    @property
    def num_samples(self) -> int:
        """Tokens whose logits are needed."""
        return self.num_scored + self.draws


class Filled(NamedTuple):
    """Rows intp [F] that begin a new block in a step, so that their block number places[i] (int32 [F]) is full after it.

    generations int32 [F]: those of the rows when the step was planned.
    """

    rows: Rows
    places: I32
    generations: I32


class EndsWithoutToken(NamedTuple):
    """Rows intp [E] whose requests end with a step that draws nothing for them (max_tokens is 0), with their ids, cached tokens and
    generations when it was planned."""

    rows: Rows
    request_ids: I64
    num_cached_tokens: I32
    generations: I32

    @classmethod
    def of(cls, chunks: list[Chunk], table: RequestTable) -> EndsWithoutToken | None:
        """Of the chunks of a step; None if there are none."""
        ending = [chunk.row for chunk in chunks if chunk.last and not chunk.draws]
        if not ending:
            return None
        rows = np.array(ending, dtype=np.intp)
        return cls(rows, table.request_id[rows], table.num_cached_tokens[rows], table.generation[rows])


NONE_FILLED = Filled(np.empty(0, dtype=np.intp), np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))


@dataclass(slots=True)
class StepInFlight:
    """What commit must know of a plan that was handed out. Arrays over the D rows that draw a token, in plan order.

    drawn: their places among the plan's rows, None = all of them. epoch: that of the table when planned.
    filled: the blocks that are full once it is committed. scoring: None where nobody asks. ends: None where nobody ends so.
    """

    step: int
    num_rows: int
    drawn: Rows | None
    rows: Rows
    request_ids: I64
    num_cached_tokens: I32
    generations: I32
    epoch: int
    filled: Filled
    scoring: ScoringInFlight | None = None
    ends: EndsWithoutToken | None = None
