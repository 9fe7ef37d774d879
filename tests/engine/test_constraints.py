"""Requests under a grammar in the engine's loop, with a scheduler, real grammars and no model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from toka.engine.constraints import Constraints
from toka.engine.core import EngineCore
from toka.errors import ConfigError, RequestError
from toka.messages import FinishReason, Submit, pack_tokens
from toka.params import SamplingParams, StructuredOutput
from toka.plan import BatchPlan, StepResult, TokenMasks
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.scheduler import Scheduler
from toka.text.grammar import GrammarVocabulary

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS = len(ALPHABET)
VOCAB_SIZE = EOS + 1
FREE = ALPHABET.index("!")  # what is drawn without a mask


def vocabulary() -> GrammarVocabulary:
    """One token a byte, and the end."""
    places = {char: place for place, char in enumerate([*ALPHABET, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=places, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return GrammarVocabulary(tokenizer.to_str(), (EOS,), VOCAB_SIZE)


class LowestAllowed:
    """An executor whose model draws the lowest id that a mask allows; a step runs when it is waited for."""

    def __init__(self) -> None:
        self._in_flight: deque[tuple[BatchPlan, Future[TokenMasks]]] = deque()
        self.num_tokens: list[int] = []  # of each step

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def launch(self, plan: BatchPlan) -> None:
        self.num_tokens.append(plan.num_tokens)
        self._in_flight.append((plan, Future()))

    def deliver(self, masks: TokenMasks) -> None:
        next(f for plan, f in self._in_flight if plan.masked is not None and not f.done()).set_result(masks)

    def wait(self) -> StepResult:
        plan, masks = self._in_flight.popleft()
        drawn = np.full(int(plan.samples.sum()), FREE, dtype=np.int32)
        if plan.masked is not None:
            bits = np.unpackbits(masks.result(timeout=0).view(np.uint8), axis=1, bitorder="little")
            assert len(bits) == plan.masked.drawn.sum() == len(plan.masked.request_ids)
            drawn[plan.masked.drawn] = bits.argmax(axis=1)
        sampled = np.zeros(plan.num_rows, dtype=np.int32)
        sampled[plan.samples] = drawn
        return StepResult(plan.step, sampled)

    def shutdown(self) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[EngineCore]:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_request_tokens=64, vocab_size=VOCAB_SIZE))
    compiled = cast("Any", SimpleNamespace(compiles_after_freeze=0))
    engine = EngineCore(scheduler, LowestAllowed(), compiled, Constraints(vocabulary, VOCAB_SIZE))
    yield engine
    engine.shutdown()


def submit(request_id: int, pattern: str | None, **fields: Any) -> Submit:
    structured = None if pattern is None else StructuredOutput("regex", pattern)
    sampling = SamplingParams(**{"max_tokens": 20, "structured": structured, **fields})
    prompt = pack_tokens([1, 2, 3])
    return Submit(request_id=request_id, prompt=prompt, sampling=sampling, stop_token_ids=(), seed=0)


def run(engine: EngineCore) -> dict[int, tuple[str, FinishReason]]:
    """What becomes of every request."""
    texts: dict[int, str] = {}
    ends: dict[int, FinishReason] = {}
    while engine.has_work:
        assert not engine.submit_compiled()
        outputs = engine.step()
        if outputs is None:
            continue
        columns = (outputs.request_ids, outputs.token_ids, outputs.finish, outputs.cached)
        assert [column.dtype for column in columns] == [np.int64, np.int32, np.uint8, np.int32]
        assert len({len(column) for column in columns}) == 1
        for request_id, token, finish in zip(*(column.tolist() for column in columns[:3]), strict=True):
            assert request_id not in ends
            texts[request_id] = texts.get(request_id, "") + (ALPHABET[token] if 0 <= token < EOS else "")
            if finish:
                ends[request_id] = FinishReason(finish)
    assert engine.constraints is not None and not engine.constraints._states
    return {request_id: (texts[request_id], ends[request_id]) for request_id in texts}


@pytest.mark.parametrize("waits", [False, True])
def test_each_request_keeps_to_its_grammar(engine: EngineCore, waits: bool) -> None:
    for request_id, pattern in ((1, "[b-d]{3}x"), (2, None), (3, "z*"), (4, "hello world, hello[!?]")):
        engine.submit(submit(request_id, pattern, n=1, max_tokens=30), waits=waits)
    assert run(engine) == {
        1: ("bbbx", FinishReason.STOP),
        2: ("!" * 30, FinishReason.LENGTH),
        3: ("z" * 30, FinishReason.LENGTH),  # the lowest id comes before the end's
        4: ("helloĠworld,Ġhello!", FinishReason.STOP),
    }
    assert any(tokens > 10 for tokens in engine.executor.num_tokens[2:])  # type: ignore[attr-defined]


def test_samples_and_end_tokens(engine: EngineCore) -> None:
    """Nobody says which token ends a text: the grammar's end does, also where end tokens are ignored."""
    engine.submit(submit(1, "ab", n=3, ignore_eos=True), waits=True)
    engine.submit(submit(7, "a{2}b?", max_tokens=3, min_tokens=3), waits=True)
    assert run(engine) == {**{i: ("ab", FinishReason.STOP) for i in (1, 2, 3)}, 7: ("aab", FinishReason.LENGTH)}


def test_a_request_waits_for_its_grammar_and_others_do_not(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    may_compile, compile_grammar = threading.Event(), GrammarVocabulary.compile

    def compile_late(self: GrammarVocabulary, structured: StructuredOutput) -> Any:
        assert may_compile.wait(10)
        return compile_grammar(self, structured)

    monkeypatch.setattr(GrammarVocabulary, "compile", compile_late)
    engine.submit(submit(1, "ab"))
    engine.submit(submit(4, "cd", n=2))
    engine.submit(submit(2, None, max_tokens=5))
    ended: list[int] = []
    while 2 not in ended:
        assert not engine.submit_compiled()
        outputs = engine.step()
        ended += [] if outputs is None else outputs.request_ids[outputs.finish > 0].tolist()
    assert ended == [2] and engine.has_work and engine.step() is None
    engine.abort([1, 5])
    may_compile.set()
    assert run(engine) == {4: ("cd", FinishReason.STOP)}


def test_a_wrong_grammar_is_refused_when_it_is_compiled(engine: EngineCore) -> None:
    with pytest.raises(RequestError, match="not valid"):
        engine.submit(submit(1, "(a"), waits=True)
    engine.submit(submit(2, "(b"))
    refused: list[tuple[Submit, RequestError]] = []
    while engine.has_work:
        refused += engine.submit_compiled()
        engine.step()
    [(refused_submit, error)] = refused
    assert refused_submit.request_id == 2 and "not valid" in error.message
    engine.submit(submit(3, "ab"))
    assert run(engine) == {3: ("ab", FinishReason.STOP)}


def test_aborted_requests_are_forgotten(engine: EngineCore) -> None:
    engine.submit(submit(1, "[ab]{20}", n=2), waits=True)
    for _ in range(3):
        engine.step()
    engine.abort([1])
    [(request_id, (text, finish))] = run(engine).items()
    assert (request_id, set(text), finish) == (2, {"a"}, FinishReason.LENGTH)


def test_a_grammar_is_compiled_once(engine: EngineCore) -> None:
    assert engine.constraints is not None
    first = engine.constraints.compile(StructuredOutput("regex", "abc"))
    assert engine.constraints.compile(StructuredOutput("regex", "abc")) is first
    assert engine.constraints.compile(StructuredOutput("lark", "abc")) is not first


def test_an_engine_without_a_vocabulary_refuses_grammars_alone() -> None:
    def no_vocabulary() -> GrammarVocabulary:
        raise ConfigError("this model has no tokenizer")

    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_request_tokens=64))
    compiled = cast("Any", SimpleNamespace(compiles_after_freeze=0))
    engine = EngineCore(scheduler, LowestAllowed(), compiled, Constraints(no_vocabulary, VOCAB_SIZE))
    with pytest.raises(RequestError, match="no tokenizer"):
        engine.submit(submit(1, "a"), waits=True)
    engine.submit(submit(2, None, max_tokens=3))
    assert run(engine) == {2: ("!!!", FinishReason.LENGTH)}
    with pytest.raises(RequestError, match="no grammars"):
        EngineCore(scheduler, LowestAllowed(), compiled).submit(submit(3, "a"))
