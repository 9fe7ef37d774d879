"""How long will outputs be? Learnt from the requests that ended: the fraction of its max_tokens that each one used.

Requests fall into classes by prompt length and max_tokens. A prediction is conditional: only the fractions count that
were seen in the request's class and lie beyond what it has generated already, so it moves up as a request outlives it.
It is max_tokens while too little is known.

Predictions are for adding up over many requests. If each one were the mean, nobody would be expected to end soon, and
far fewer blocks to come free than do. So they are spread as what was seen is: each request stands for one quantile of
the distribution, chosen by its arrival number such that any number of requests in sequence spread evenly. On average
over requests that is the mean, to which `margin` standard deviations are added.

If traffic shifts to longer outputs, predictions made at admission turn out too low: when that happens to most requests,
what was seen before is forgotten; when blocks run out (`widen`), the margin grows at once and shrinks again as requests
end in peace.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import NamedTuple

import numpy as np

from toka.plan import I64

WINDOW = 2048  # ends remembered, all classes together
MIN_SEEN = 16  # ends of a class (failing that, of all classes) before anything is predicted
MIN_SURVIVORS = 4  # ends beyond the present length, fewer predict nothing
REBUILD_EVERY = 16  # ends between two rebuildings of the sorted table
SHIFT_WINDOW = 64  # the last ends judged together
SHIFT_SHARE = 0.7  # of them longer than predicted: the traffic has shifted
WIDENING = 0.5  # standard deviations that one shortage adds to the margin
MAX_WIDENING = 4.0
CALM_ENDS = 128  # ends that take a widened margin down to 1/e of it

ROUNDING = 1e-6  # tokens; fractions of whole numbers are not exact
GOLDEN = (5**0.5 - 1) / 2  # its multiples spread evenly over the circle

_NUM_PROMPT_BUCKETS = 16
_NUM_CLASSES = _NUM_PROMPT_BUCKETS * 32
ALL = _NUM_CLASSES  # stands for every class together


class _End(NamedTuple):
    """How one request ended: its class, and tokens generated of max_tokens."""

    number: int
    fraction: float


class _Table(NamedTuple):
    """The ends, sorted by class and fraction, every one in its class and in ALL; E entries.

    order float64 [E + 1]: 2 * class + fraction, infinity at the end. first int64 [classes + 1]: where each class begins.
    sums, squares float64 [E + 1]: of all fractions before each entry.
    """

    order: np.ndarray[tuple[int], np.dtype[np.float64]]
    first: I64
    sums: np.ndarray[tuple[int], np.dtype[np.float64]]
    squares: np.ndarray[tuple[int], np.dtype[np.float64]]


def class_of(num_prompt_tokens: int, max_tokens: int) -> int:
    """The class of a request: prompt lengths by powers of four, max_tokens by powers of two."""
    prompt_bucket = min(num_prompt_tokens.bit_length() // 2, _NUM_PROMPT_BUCKETS - 1)
    return prompt_bucket * 32 + min(max_tokens.bit_length(), 31)


class StopPredictor:
    """Predicts output lengths. margin: standard deviations added; no clock, no randomness."""

    def __init__(self, margin: float):
        self._margin = margin
        self._widening = 0.0
        self._ends: deque[_End] = deque(maxlen=WINDOW)
        self._was_longer: deque[bool] = deque(maxlen=SHIFT_WINDOW)
        self._num_unsorted = 0
        self._table = _sorted_table(self._ends)

    @property
    def margin(self) -> float:
        """Standard deviations added at present."""
        return self._margin + self._widening

    def observe(self, number: int, num_generated: int, max_tokens: int, predicted: int) -> None:
        """A request of class `number` ended of itself after num_generated of max_tokens tokens; predicted: at admission."""
        self._ends.append(_End(number, num_generated / max_tokens))
        self._was_longer.append(num_generated > predicted)
        self._widening *= 1.0 - 1.0 / CALM_ENDS
        if len(self._was_longer) == SHIFT_WINDOW and sum(self._was_longer) > SHIFT_SHARE * SHIFT_WINDOW:
            recent = list(islice(reversed(self._ends), SHIFT_WINDOW))
            self._ends.clear()
            self._ends.extend(reversed(recent))
            self._was_longer.clear()
            self._num_unsorted = REBUILD_EVERY
        self._num_unsorted += 1
        if self._num_unsorted >= REBUILD_EVERY:
            self._table = _sorted_table(self._ends)
            self._num_unsorted = 0

    def widen(self) -> None:
        """Blocks ran out: what was predicted was too little."""
        self._widening = min(self._widening + WIDENING, MAX_WIDENING)

    def predict_one(self, number: int, arrival: int, num_generated: int, max_tokens: int) -> int:
        """`predict` for one request."""
        columns = (np.array([value], dtype=np.int64) for value in (number, arrival, num_generated, max_tokens))
        return int(self.predict(*columns)[0])

    def predict(self, numbers: I64, arrivals: I64, num_generated: I64, max_tokens: I64) -> I64:
        """Whole output lengths of R requests of these classes that go on after num_generated tokens; int64 [R], more than
        num_generated and at most max_tokens (which is more than num_generated, unless it is 0)."""
        order, first, sums, squares = self._table
        known = first[numbers + 1] - first[numbers] >= MIN_SEEN
        numbers = np.where(known, numbers, ALL)
        stop = first[numbers + 1]
        place = np.searchsorted(order, 2 * numbers + num_generated / np.maximum(max_tokens, 1), side="right")
        survivors = stop - place
        count = np.maximum(survivors, 1)
        mean = (sums[stop] - sums[place]) / count
        variance = np.maximum((squares[stop] - squares[place]) / count - mean * mean, 0.0)
        quantile = arrivals * GOLDEN % 1.0
        fraction = (
            order[place + (quantile * survivors).astype(np.int64)] - 2 * numbers + self.margin * np.sqrt(variance)
        )
        enough = (survivors >= MIN_SURVIVORS) & (first[numbers + 1] - first[numbers] >= MIN_SEEN)
        predicted = np.where(enough, np.ceil(fraction * np.maximum(max_tokens, 1) - ROUNDING), max_tokens).astype(
            np.int64
        )
        return np.minimum(np.maximum(predicted, num_generated + 1), max_tokens)


def _sorted_table(ends: deque[_End]) -> _Table:
    """The ends in order."""
    numbers = np.array([end.number for end in ends], dtype=np.int64)
    fractions = np.array([end.fraction for end in ends], dtype=np.float64)
    order = np.sort(np.concatenate((2 * numbers + fractions, 2 * ALL + fractions)))
    classes = (order / 2).astype(np.int64)
    values = order - 2 * classes
    zero = np.zeros(1)
    return _Table(
        order=np.append(order, np.inf),
        first=np.searchsorted(classes, np.arange(ALL + 2)),
        sums=np.concatenate((zero, np.cumsum(values))),
        squares=np.concatenate((zero, np.cumsum(values * values))),
    )
