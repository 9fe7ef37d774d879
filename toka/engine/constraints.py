"""The texts of requests under a grammar: where each stands, what may come next in it (floor 7).

A state belongs to a request, not to a row: it takes every token when that is committed, so that preemption, late results that are
dropped and prompts in chunks do not concern it. Masks of a step are written when all steps before it are committed, while that step
runs; the runner needs them behind its last product only. Where a grammar leaves no choice, the scheduler is told the tokens, which are
then computed together, as those of a prompt.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from toka.errors import ConfigError, RequestError
from toka.messages import FinishReason, Submit
from toka.params import StructuredOutput
from toka.plan import MaskedDraws, TokenMasks
from toka.scheduler.outputs import TokenOutputs
from toka.scheduler.scheduler import Scheduler
from toka.text.grammar import GrammarState, GrammarVocabulary, MaskWriter

log = logging.getLogger(__name__)

MAX_COMPILED = 64  # grammars kept for the requests that use them again
MAX_TAKE_S = 0.25  # of CPU time; a text that takes longer to follow by a step holds up all others


class Constraints:
    """All grammars of one engine. vocabulary: makes what they have to know of the tokens; called once, on a thread, by `prepare` or when
    the first grammar comes. vocab_size: of the model."""

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary], vocab_size: int):
        self._make_vocabulary = vocabulary
        self._vocabulary: GrammarVocabulary | None = None
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._compiled: OrderedDict[StructuredOutput, Future[GrammarState]] = OrderedDict()
        self._writer: MaskWriter | None = None
        self._states: dict[int, GrammarState] = {}  # by request id

    def prepare(self) -> None:
        """Get ready for the first grammar, on a thread; returns at once."""
        self._thread.submit(self._known_vocabulary)

    def compile(self, structured: StructuredOutput) -> Future[GrammarState]:
        """The grammar at its beginning, compiled on a thread if it is not known. The future raises RequestError if it is wrong."""
        future = self._compiled.get(structured)
        if future is None or (future.done() and future.exception() is not None):
            future = self._thread.submit(lambda: self._known_vocabulary().compile(structured))
            self._compiled[structured] = future
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(structured)
        return future

    def _known_vocabulary(self) -> GrammarVocabulary:
        if self._vocabulary is None:  # only its own thread comes here
            try:
                self._vocabulary = self._make_vocabulary()
            except ConfigError as error:
                raise RequestError(f"{error}.") from error
        return self._vocabulary

    def stop_token_ids(self, submit: Submit) -> tuple[int, ...]:
        """Those of a request under a compiled grammar: the end of its text, which comes only where the grammar allows it, ends it
        whatever it said of end tokens."""
        assert self._vocabulary is not None
        return tuple(dict.fromkeys((*submit.stop_token_ids, *self._vocabulary.eos_token_ids)))

    def begin(self, submit: Submit, grammar: GrammarState) -> None:
        """Follow the samples of this request, which was submitted to the scheduler."""
        for request_id in range(submit.request_id, submit.request_id + submit.sampling.n):
            self._states[request_id] = grammar.fork(ignores_eos=submit.sampling.ignore_eos)

    def drop(self, request_ids: Sequence[int]) -> None:
        """These requests are over; ids that are not followed are ignored."""
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def follow(self, outputs: TokenOutputs, scheduler: Scheduler) -> TokenOutputs:
        """Take in the tokens of a committed step, tell the scheduler what is forced to follow, and end requests that cannot be followed
        any further. Returns the outputs with these tokens and ends behind the others."""
        if not self._states:
            return outputs
        more: list[tuple[int, int, FinishReason]] = []
        for place, request_id in enumerate(outputs.request_ids.tolist()):
            state = self._states.get(request_id)
            if state is None:
                continue
            if outputs.finish[place]:
                del self._states[request_id]
                continue
            forced, error = self._take(state, request_id, int(outputs.token_ids[place]), scheduler)
            more += [(request_id, token_id, FinishReason.NONE) for token_id in forced]
            if error is not None:
                log.warning("request %d ends: its grammar %s", request_id, error)
                scheduler.abort(request_id)
                del self._states[request_id]
                more.append((request_id, -1, FinishReason.ERROR))
        return outputs.plus(more) if more else outputs

    def _take(
        self, state: GrammarState, request_id: int, token_id: int, scheduler: Scheduler
    ) -> tuple[list[int], str | None]:
        """The tokens that the scheduler added to the text, and what is wrong with it, if anything."""
        began = time.thread_time()
        state.take([token_id])
        forced = list(state.forced)
        if forced:
            forced = forced[: scheduler.extend(request_id, forced)]
            state.take(forced)
        error = state.error
        if error is None and (took_s := time.thread_time() - began) > MAX_TAKE_S:
            error = f"took {took_s:.2f} s to follow one token"
        return forced, error

    def masks(self, masked: MaskedDraws) -> TokenMasks:
        """Those of a step's masked draws; all steps before it must be committed. What is drawn for a request that is over is dropped, so
        anything may be."""
        if self._writer is None:
            self._writer = MaskWriter(self._vocab_size)
        return self._writer.write([self._states.get(request_id) for request_id in masked.request_ids.tolist()])

    def shutdown(self) -> None:
        """Compile no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
