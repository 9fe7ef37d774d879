"""Plans with adjusted rows: a device that does no more than they say knows every token of such rows whenever it draws for them."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from toka.messages import Submit, pack_tokens
from toka.params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIASES, SamplingParams
from toka.plan import BatchPlan, StepResult
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.scheduler import Scheduler

PLAIN = SamplingParams(max_tokens=20)
ADJUSTED = SamplingParams(
    max_tokens=20,
    n=2,
    presence_penalty=0.5,
    frequency_penalty=1.0,
    repetition_penalty=1.5,
    logit_bias=((7, 2.5), (3, -1.0)),
    bad_words=((5,), (1, 2, 3)),
)
SYSTEM = list(range(20, 40))


class Device:
    """Block table, last tokens and what stands in which slot, all of it changed by plans alone."""

    def __init__(self, config: SchedulerConfig):
        self._block_size = config.block_size
        self._table = np.zeros((config.max_rows, config.max_blocks_per_row), dtype=np.int64)
        self._last_token = np.zeros(config.max_rows, dtype=np.int32)
        self._token_of_slot = np.full(config.num_blocks * config.block_size, -1, dtype=np.int32)
        self._settings: dict[int, tuple[int, list[float]]] = {}
        self.num_adjusted_draws = 0

    def run(self, plan: BatchPlan, true_tokens: dict[int, np.ndarray]) -> StepResult:
        """true_tokens: by row, as far as the host knows them."""
        self._table[plan.table.rows, plan.table.columns] = plan.table.blocks
        rows, positions = plan.token_rows(), plan.positions()
        ids = np.where(plan.token_ids < 0, self._last_token[np.maximum(-1 - plan.token_ids, 0)], plan.token_ids)
        if plan.adjusting is not None:
            self._remember(plan, ids, rows, positions)
        drawn = (plan.rows.astype(np.int64) * 31 + plan.seq_lens * 7) % 50
        if plan.adjusting is not None:
            for row, seq_len, adjusted in zip(
                plan.rows[plan.samples], plan.seq_lens[plan.samples], plan.adjusting.drawn, strict=True
            ):
                if adjusted:
                    self._check(int(row), int(seq_len), true_tokens[int(row)])
        self._last_token[plan.rows[plan.samples]] = drawn[plan.samples]
        return StepResult(plan.step, np.where(plan.samples, drawn, 0).astype(np.int32))

    def _remember(self, plan: BatchPlan, ids: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        assert plan.adjusting is not None
        if (settings := plan.adjusting.settings) is not None:
            self._token_of_slot[settings.cached_slots] = settings.cached_tokens
            for row, num_prompt, penalties in zip(
                settings.rows.tolist(), settings.num_prompt_tokens.tolist(), settings.penalties.tolist(), strict=True
            ):
                self._settings[row] = num_prompt, penalties
        places = plan.adjusting.places
        slots = self._slots(rows[places], positions[places])
        self._token_of_slot[slots] = ids[places]

    def _slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        size = self._block_size
        return self._table[rows, positions // size] * size + positions % size

    def _check(self, row: int, seq_len: int, known: np.ndarray) -> None:
        told = self._token_of_slot[self._slots(np.full(seq_len, row), np.arange(seq_len))]
        assert told[: len(known)].tolist() == known[:seq_len].tolist()
        assert told[seq_len - 1] >= 0 and self._settings[row][1] == [0.5, 1.0, 1.5]
        self.num_adjusted_draws += 1


def serve(config: SchedulerConfig, submits: list[Submit]) -> tuple[Device, Scheduler]:
    scheduler, device = Scheduler(config, secret=b"of these tests only"), Device(config)
    for submit in submits:
        scheduler.submit(submit)
    in_flight: deque[StepResult] = deque()
    while scheduler.has_work:
        while (plan := scheduler.next_plan()) is not None:
            table = scheduler._table
            in_flight.append(device.run(plan, {int(row): table.tokens_of(int(row)) for row in plan.rows}))
        scheduler.commit(in_flight.popleft())
    return device, scheduler


def config(**changes: object) -> SchedulerConfig:
    sizes = {"vocab_size": 64, "num_blocks": 60, "block_size": 8, "max_request_tokens": 100, "max_seqs_per_forward": 8}
    return SchedulerConfig(**{**sizes, "max_tokens_per_forward": 24, **changes})


def requests(num: int) -> list[Submit]:
    return [
        Submit(
            request_id=10 * i,
            prompt=pack_tokens([*SYSTEM, *range(i + 1)]),
            sampling=PLAIN if i % 3 == 2 else ADJUSTED,
            stop_token_ids=(),
            seed=i,
        )
        for i in range(num)
    ]


@pytest.mark.parametrize(
    "changes",
    [{}, {"prefix_cache": False}, {"steps_in_flight": 4}, {"num_blocks": 14, "admission": "when_free"}],
    ids=["as it is", "no prefix cache", "four steps in flight", "preempted"],
)
def test_the_device_knows_every_token(changes: dict[str, object]) -> None:
    device, scheduler = serve(config(**changes), requests(7))
    assert device.num_adjusted_draws >= 5 * 2 * 20
    if "num_blocks" in changes:
        assert scheduler.stats().preemptions_total > 0
    elif "prefix_cache" not in changes:
        assert scheduler.stats().cached_prompt_tokens_total > 0


def test_what_a_plan_says() -> None:
    scheduler = Scheduler(config(prefix_cache=False), secret=b"of these tests only")
    plain, adjusted = requests(3)[2], requests(1)[0]
    scheduler.submit(plain)
    assert scheduler.next_plan().adjusting is None
    scheduler.submit(adjusted)
    first = scheduler.next_plan()
    assert first.adjusting.drawn.tolist() == [False, True]  # the second sample's prompt does not fit into the step
    settings = first.adjusting.settings
    assert settings.num_prompt_tokens.tolist() == [21, 21] and not len(settings.cached_slots)
    assert settings.bias_ids.shape == (2, MAX_LOGIT_BIASES)
    assert settings.bias_ids[0, :3].tolist() == [7, 3, -1] and settings.biases[0, :2].tolist() == [2.5, -1.0]
    assert settings.bad_words.shape == (2, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
    assert settings.bad_words[0, :3, -3:].tolist() == [[-1, -1, 5], [1, 2, 3], [-1, -1, -1]]
    assert first.adjusting.places.tolist() == list(range(1, first.num_tokens))
