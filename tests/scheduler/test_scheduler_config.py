from __future__ import annotations

from typing import Any

import pytest

from toka.errors import ConfigError
from toka.scheduler.config import SchedulerConfig


@pytest.mark.parametrize(
    "field", ["num_blocks", "block_size", "max_tokens_per_forward", "steps_in_flight", "vocab_size"]
)
def test_a_size_below_one_is_refused_by_name(field: str) -> None:
    sizes: dict[str, Any] = {"num_blocks": 8, "max_request_tokens": 8, field: 0}
    with pytest.raises(ConfigError, match=field):
        SchedulerConfig(**sizes)


@pytest.mark.parametrize("watermark", [-0.1, 1.0, float("nan")])
def test_watermark_is_a_share(watermark: float) -> None:
    with pytest.raises(ConfigError, match="watermark"):
        SchedulerConfig(num_blocks=8, max_request_tokens=8, watermark=watermark)


@pytest.mark.parametrize(
    ("num_blocks", "context", "tokens", "blocks"),
    [(10, 100, 41, 10), (30, 100, 100, 25), (30, 101, 101, 25), (5, 1, 1, 1)],
)
def test_limits_of_one_request(num_blocks: int, context: int, tokens: int, blocks: int) -> None:
    config = SchedulerConfig(num_blocks=num_blocks, block_size=4, max_request_tokens=context)
    assert (config.max_tokens_per_request, config.max_blocks_per_row) == (tokens, blocks)


def test_rows_that_run_always_find_a_token_in_the_step() -> None:
    config = SchedulerConfig(num_blocks=8, max_request_tokens=8, max_tokens_per_forward=5, max_seqs_per_forward=9)
    assert (config.max_running, config.max_rows) == (5, 10)
