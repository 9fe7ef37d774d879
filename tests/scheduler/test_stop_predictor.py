from __future__ import annotations

import numpy as np
import pytest

from toka.plan import I64
from toka.scheduler import stop_predictor
from toka.scheduler.stop_predictor import StopPredictor, class_of

CHAT = class_of(100, 1000)
MAX_TOKENS = 1000


def taught(lengths: list[int], *, margin: float = 0.0, number: int = CHAT) -> StopPredictor:
    predictor = StopPredictor(margin)
    for length in lengths:
        predictor.observe(number, length, MAX_TOKENS, predicted=MAX_TOKENS)
    return predictor


def predictions(predictor: StopPredictor, *, number: int = CHAT, num_generated: int = 0, count: int = 100) -> I64:
    columns = (np.full(count, number), np.arange(count), np.full(count, num_generated), np.full(count, MAX_TOKENS))
    return predictor.predict(*columns)


def test_classes_part_prompts_and_limits_of_different_size() -> None:
    assert class_of(100, 1000) == class_of(120, 900) != class_of(1000, 1000) != class_of(1000, 100)
    assert class_of(1, 1) >= 0 and class_of(2**40, 2**40) < stop_predictor.ALL


def test_it_is_max_tokens_until_enough_is_seen() -> None:
    assert set(predictions(taught([100] * (stop_predictor.MIN_SEEN - 1)))) == {MAX_TOKENS}
    assert set(predictions(taught([100] * stop_predictor.MIN_SEEN))) == {100}


def test_predictions_of_many_add_up_to_what_was_seen() -> None:
    lengths = np.random.default_rng(0).integers(1, 901, 512)
    found = predictions(taught(lengths.tolist()), count=512)
    assert found.mean() == pytest.approx(lengths.mean(), rel=0.05)
    assert found.std() == pytest.approx(lengths.std(), rel=0.05)
    wider = predictions(taught(lengths.tolist(), margin=0.25), count=512)
    assert np.all(wider >= found) and np.median(wider - found) == pytest.approx(0.25 * lengths.std(), rel=0.1)


def test_who_outlives_most_is_compared_with_those_who_did_too() -> None:
    predictor = taught([100] * 48 + [600] * 16)
    assert sorted(set(predictions(predictor))) == [100, 600]
    assert set(predictions(predictor, num_generated=100)) == {600}
    assert set(predictions(predictor, num_generated=600)) == {MAX_TOKENS}


def test_a_class_of_which_little_is_known_goes_by_all() -> None:
    predictor = taught([100] * 32)
    assert predictor.predict_one(class_of(8000, 1000), 5, 0, 500) == 50


def test_predictions_stay_beyond_what_there_is_and_within_the_limit() -> None:
    predictor = taught([1] * 64, margin=3.0)
    assert predictor.predict_one(CHAT, 0, 0, 1) == 1
    assert predictor.predict_one(CHAT, 0, 5, 9) in range(6, 10)
    assert set(predictions(taught([990] * 32 + [10] * 32, margin=5.0))) == {MAX_TOKENS}


def test_old_ends_are_forgotten() -> None:
    predictor = taught([900] * 64 + [100] * stop_predictor.WINDOW)
    assert set(predictions(predictor)) == {100}


def test_after_a_shift_only_what_came_lately_counts() -> None:
    predictor = StopPredictor(0.0)
    for length in [100] * 1000 + [400] * 80:
        predictor.observe(CHAT, length, MAX_TOKENS, predicted=100)
    assert np.count_nonzero(predictions(predictor) == 400) > 75


def test_a_shortage_widens_the_margin_and_peace_narrows_it() -> None:
    predictor = taught([100, 300] * 32, margin=0.25)
    before = predictions(predictor)
    predictor.widen()
    assert predictor.margin == 0.25 + stop_predictor.WIDENING
    assert np.all(predictions(predictor) > before)
    for _ in range(100):
        predictor.widen()
    assert predictor.margin == 0.25 + stop_predictor.MAX_WIDENING
    for _ in range(10 * stop_predictor.CALM_ENDS):
        predictor.observe(CHAT, 100, MAX_TOKENS, predicted=MAX_TOKENS)
    assert predictor.margin == pytest.approx(0.25, abs=0.01)
