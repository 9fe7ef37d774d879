"""Stop strings: found wherever the text is cut, never let through."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from toka.text.stop import StopMatcher

_texts = st.text("ab\n ", max_size=60)
_stops = st.lists(st.text("ab\n ", min_size=1, max_size=5), min_size=1, max_size=4)


def _pieces(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def _by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut at the first end of a stop string; of those that end there, at the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(_texts, _stops, st.lists(st.integers(0, 100)))
def test_any_cut_gives_the_text_up_to_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    seen = ""
    for piece in _pieces(text, cuts):
        seen += matcher.push(piece)
        if matcher.stopped:
            break
    else:
        seen += matcher.flush()
    assert (seen, matcher.stopped) == _by_definition(text, stops)


@given(_texts, _stops, st.lists(st.integers(0, 100)))
def test_no_more_is_held_back_than_may_begin_a_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    pushed = seen = ""
    for piece in _pieces(text, cuts):
        pushed += piece
        seen += matcher.push(piece)
        if matcher.stopped:
            return
        held = pushed[len(seen) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert seen + held == pushed


def test_streamed_text_never_contains_the_beginning_of_the_stop_that_follows() -> None:
    matcher = StopMatcher(["Question:"])
    assert [matcher.push(piece) for piece in ("42.\nQu", "est", "ion", ": next")] == ["42.\n", "", "", ""]
    assert matcher.stopped


def test_a_false_start_is_let_go_when_it_fails() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("aa") == ""
    assert matcher.push("a") == "a"
    assert matcher.push("c") == "aac"
    assert not matcher.stopped


def test_the_longest_of_those_that_end_together_counts() -> None:
    matcher = StopMatcher(["b", "ab"])
    assert matcher.push("xab") == "x"


def test_before_min_tokens_a_stop_is_text() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("ab", may_stop=False) == "ab"
    assert not matcher.stopped
    assert matcher.push("ab") == ""
    assert matcher.stopped


def test_a_stop_that_begins_before_min_tokens_and_ends_after_counts() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("xa", may_stop=False) == "x"
    assert matcher.push("b") == ""
    assert matcher.stopped


def test_work_per_character_does_not_grow_with_the_stop_strings() -> None:
    """A text made to defeat naive matching: each character extends and breaks long partial matches."""
    stop = "a" * 1000 + "b"
    matcher = StopMatcher([stop])
    text = "".join(matcher.push("a") for _ in range(50_000)) + matcher.flush()
    assert text == "a" * 50_000
