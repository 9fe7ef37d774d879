from __future__ import annotations

import numpy as np

from toka.params import MAX_STOP_TOKEN_IDS, SamplingParams
from toka.plan import BlockTableChanges
from toka.scheduler.plan_builder import NO_SETTINGS, NO_TABLE_CHANGES, merge_table_changes, settings_of
from toka.scheduler.prefix_index import KeyChain
from toka.scheduler.request import Rank, Request


def request(sampling: SamplingParams, *, seed: int = 0, stop_token_ids: tuple[int, ...] = ()) -> Request:
    return Request(
        request_id=1,
        rank=Rank(0, 0.0, 0),
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        seed=seed,
        num_prompt_tokens=10,
        max_total_tokens=20,
        chain=KeyChain(b"", "", 4),
    )


def test_settings_are_columns_of_the_declared_types() -> None:
    sampling = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, min_tokens=3)
    made = settings_of([(4, request(SamplingParams(), seed=-1)), (2, request(sampling, seed=9, stop_token_ids=(5, 6)))])
    assert made.rows.tolist() == [4, 2] and made.seed.tolist() == [-1, 9]
    assert [made.temperature.tolist(), made.top_p.tolist(), made.min_p.tolist()] == [[1, 0.5], [1, 0.25], [0, 0.125]]
    assert made.top_k.tolist() == [0, 7]
    assert made.held_back_until.tolist() == [0, 13]
    assert made.held_back_ids[0].tolist() == [-1] * MAX_STOP_TOKEN_IDS
    assert made.held_back_ids[1].tolist() == [5, 6] + [-1] * (MAX_STOP_TOKEN_IDS - 2)
    for field in ("rows", "temperature", "top_k", "top_p", "min_p", "seed", "held_back_ids", "held_back_until"):
        assert getattr(made, field).dtype == getattr(NO_SETTINGS, field).dtype
        assert getattr(made, field).shape[1:] == getattr(NO_SETTINGS, field).shape[1:]


def test_a_seed_past_63_bits_wraps() -> None:
    assert settings_of([(0, request(SamplingParams(), seed=2**63))]).seed.tolist() == [-(2**63)]


def test_no_changes_cost_nothing() -> None:
    assert settings_of([]) is NO_SETTINGS
    assert merge_table_changes([]) is NO_TABLE_CHANGES


def test_changes_merge_in_order() -> None:
    one, two = (BlockTableChanges(*(np.array([3 * i + j], dtype=np.int32) for j in range(3))) for i in range(2))
    merged = merge_table_changes([one, two])
    assert [merged.rows.tolist(), merged.columns.tolist(), merged.blocks.tolist()] == [[0, 3], [1, 4], [2, 5]]
    assert merge_table_changes([one]) is one
