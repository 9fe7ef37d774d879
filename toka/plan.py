"""What goes down to the runner each step and what comes back: flat numpy arrays, no object per request (floor 1, no torch).

Legend: R rows scheduled this step, T tokens scheduled this step. A *row* is a request's index in the request table and in every
table that lives on the device; it stays the same as long as the request runs. Nothing here is padded: the runner pads to its bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

SHARED_PREFIX_STEP = 64  # positions where a group of rows that share a prefix may begin or end are multiples of it
MAX_SHARED_LEVELS = 3  # groups that one row can be in


@dataclass(frozen=True, slots=True)
class RowSettings:
    """Sampling settings of rows that begin (or begin again) to run in this step; they stay on the device until replaced.

    rows int32 [C]; temperature, top_p, min_p float32 [C]; top_k int32 [C]; seed int64 [C];
    held_back_ids int32 [C, MAX_STOP_TOKEN_IDS]: token ids that may not be drawn while the position of the token to be drawn is
    below held_back_until int32 [C] (min_tokens); -1 fills unused places.
    """

    rows: I32
    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    seed: I64
    held_back_ids: I32
    held_back_until: I32


@dataclass(frozen=True, slots=True)
class BlockTableChanges:
    """Entries to set in the device's block table before the step: table[rows[i], columns[i]] = blocks[i]; int32 [C] each."""

    rows: I32
    columns: I32
    blocks: I32


@dataclass(frozen=True, slots=True)
class SharedPrefixPlan:
    """Decode rows of a step that hold the same blocks, so that attention over these is computed once for all of them.

    groups: int32 [G, 5], at least one: level, first member, end of members, first position, end position. members: int32 [N], the
    places of the groups' rows in the batch. lens: int32 [D], one for each of the step's first D rows, which decode: the row's groups
    tile the positions 0 .. lens[i] - 1, level by level. Positions are multiples of SHARED_PREFIX_STEP.
    """

    groups: I32
    members: I32
    lens: I32


@dataclass(frozen=True, slots=True)
class Scoring:
    """Which logprobs a step is to find.

    drawn: bool [D], of which of the tokens that the step draws, in the order of their rows.
    places: int32 [P], tokens of the batch after which nothing is drawn, since the prompt goes on; targets: int32 [P], the ids that follow
    them there and whose logprobs are wanted. D + P is at most the rows that a step can have.
    """

    drawn: npt.NDArray[np.bool_]
    places: I32
    targets: I32


@dataclass(frozen=True, slots=True)
class MaskedDraws:
    """Which tokens of a step a grammar limits: their masks follow the plan (TokenMasks), for they depend on tokens that earlier steps have
    yet to draw.

    drawn: bool [D], of the tokens that the step draws, in the order of their rows. request_ids: int64 [C], of those among them that are
    masked, in the same order.
    """

    drawn: npt.NDArray[np.bool_]
    request_ids: I64


@dataclass(frozen=True, slots=True)
class AdjustmentSettings:
    """What adjusts the logits of rows that begin (or begin again) to run in this step; it stays on the device until replaced.

    rows int32 [C]; num_prompt_tokens int32 [C]; penalties float32 [C, 3]: presence, frequency, repetition; bias_ids int32, biases float32
    [C, MAX_LOGIT_BIASES]; bad_words int32 [C, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS], filled up with -1 in front. -1 = unused.
    cached_slots int64 [N], cached_tokens int32 [N]: what stands in the KV cache of these rows before this step.
    """

    rows: I32
    num_prompt_tokens: I32
    penalties: F32
    bias_ids: I32
    biases: F32
    bad_words: I32
    cached_slots: I64
    cached_tokens: I32


@dataclass(frozen=True, slots=True)
class Adjusting:
    """Rows of a step whose logits are adjusted before a token is drawn from them: penalties, biases, bad words.

    drawn: bool [D], of the tokens that the step draws, in the order of their rows. places: int32 [A], tokens of the batch that belong to
    such rows, which the device has to remember. settings: of those rows that begin in this step; None = of none.
    """

    drawn: npt.NDArray[np.bool_]
    places: I32
    settings: AdjustmentSettings | None = None


TokenMasks = npt.NDArray[np.int32]
"""What may be drawn, for each of the C masked draws of a step: int32 [C, ceil(V / 32)], bit v % 32 of word v / 32 for token v."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step.

    step: a number that only grows; results carry it back.
    rows: int32 [R], distinct. query_start: int32 [R + 1], row i owns tokens query_start[i] .. query_start[i + 1] - 1, at least one.
    token_ids: int32 [T]; a value below zero, -1 - row, stands for the token which that row sampled last (still on the device).
    seq_lens: int32 [R], tokens of the request in the KV cache once this step ran; so the last token of row i stands at position
    seq_lens[i] - 1 and its first at seq_lens[i] - (query_start[i + 1] - query_start[i]).
    samples: bool [R], whether the token drawn after row i's last token is wanted (False in the middle of a prefill); where the engine
    pools, whether the row's vector is.
    table, settings: changes of the tables on the device, applied in this order before the step runs.
    shared: which rows share a prefix, None = none do. It says how attention may be computed, not what.
    scoring: None where nobody asks for logprobs. masked: None where no grammar limits what is drawn.
    adjusting: None where all draw from the model's own logits.
    """

    step: int
    rows: I32
    query_start: I32
    token_ids: I32
    seq_lens: I32
    samples: npt.NDArray[np.bool_]
    table: BlockTableChanges
    settings: RowSettings
    shared: SharedPrefixPlan | None = None
    scoring: Scoring | None = None
    masked: MaskedDraws | None = None
    adjusting: Adjusting | None = None

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_samples(self) -> int:
        """Tokens of which the step computes logits."""
        return int(np.count_nonzero(self.samples)) + (0 if self.scoring is None else len(self.scoring.places))

    def positions(self) -> I32:
        """Position in its request of every token; int32 [T]."""
        lens = np.diff(self.query_start)
        first = self.seq_lens - lens
        offsets: I32 = np.repeat(first - self.query_start[:-1], lens).astype(np.int32)
        offsets += np.arange(self.num_tokens, dtype=np.int32)
        return offsets

    def token_rows(self) -> I32:
        """Row of every token; int32 [T]."""
        return np.repeat(self.rows, np.diff(self.query_start))


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """Of the model's distribution, no setting applied, for the D tokens drawn and then the P places of the plan's Scoring.

    logprobs float32 [D + P], ranks int32 [D + P] (1 = likeliest); top_ids int32, top_logprobs float32 [D + P, MAX_LOGPROBS], likeliest
    first (beyond a small vocabulary -1 and -inf). Meaningless for drawn tokens that did not ask.
    """

    logprobs: F32
    ranks: I32
    top_ids: I32
    top_logprobs: F32


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the step with the same number drew: sampled int32 [R], in the plan's row order (meaningless where samples is False).

    logprobs: None if the plan asked for none. vectors: float32 [S, width], one for each row whose samples holds, where the engine pools.
    """

    step: int
    sampled: I32
    logprobs: StepLogprobs | None = None
    vectors: F32 | None = None
