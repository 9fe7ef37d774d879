"""What the API process and the engine process say to each other: small msgspec structs, arrays as bytes (floor 1, no torch).

Down go Submit, Abort, Ping and Shutdown; up come Ready, StepOutputs, Rejected, Pong and Fatal. Each ZeroMQ message is one
msgpack-encoded struct; the tag says which. Token ids travel as little-endian int32 bytes, never as lists of Python ints.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from toka.params import SamplingParams
from toka.pooling import Pooling

LEAST_LOGPROB = np.float32(-9999.0)  # stands for -inf, which JSON cannot say


class FinishReason(enum.IntEnum):
    """Why a request ended; NONE = it goes on."""

    NONE = 0
    STOP = 1  # an end-of-sequence or stop token (which is the last token sent)
    LENGTH = 2  # max_tokens, or the context is full
    ABORT = 3  # the client left or a stop string was found above
    ERROR = 4  # the engine could not go on with this request
    EXPIRED = 5  # its deadline passed before it could begin


# ---------------------------------------------------------------------------------------------------------------- down


class Submit(msgspec.Struct, tag="submit", frozen=True, kw_only=True):
    """A prompt to generate from. Its `sampling.n` samples get the ids request_id, request_id + 1, ... request_id + n - 1.

    prompt: int32 token ids as bytes. stop_token_ids: every id that ends a sample (the model's own end tokens included unless
    ignore_eos), so that the engine needs no tokenizer. cache_salt: prefixes are shared only under the same salt.
    priority: lower runs earlier; within a priority earliest deadline first. seed: resolved, never None (sample i uses seed + i).
    session_id: requests under one id are turns of a conversation, whose KV is kept for the next turn; "": none, or unknown.
    arrival_s: when the request came, in seconds of time.perf_counter(), which all processes of a machine share. deadline_s: seconds
    from then within which it has to begin, else it ends by EXPIRED.
    """

    request_id: int
    prompt: bytes
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    seed: int
    cache_salt: str = ""
    priority: int = 0
    session_id: str = ""
    arrival_s: float = 0.0
    deadline_s: float = math.inf


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """End these requests now; ids that are unknown or already over are ignored. No output follows for them."""

    request_ids: list[int]


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Ask the engine's own loop for a sign of life; answered by Pong with the same nonce."""

    nonce: int


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Leave the loop and exit with status 0. What still runs is dropped (the API process drains first)."""


# ------------------------------------------------------------------------------------------------------------------ up


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """Sent once: the warmup is over and the engine is frozen. Sizes in tokens unless named otherwise.

    max_request_tokens: prompt + output that one request can hold (context and KV cache both considered).
    longest_step_s: how long the largest step took.
    startup_s: seconds per warmup phase, in order. report: the warmup report as a JSON-able dict.
    pooling: what is done with prompts instead of generating from them; None = the engine generates. max_request_tokens is then the
    longest prompt.
    """

    vocab_size: int
    max_context_tokens: int
    max_request_tokens: int
    num_kv_blocks: int
    block_size: int
    dtype: str
    device: str
    longest_step_s: float
    startup_s: dict[str, float]
    report: dict[str, object]
    pooling: Pooling | None = None


class TokenLogprob(NamedTuple):
    """How likely one token was. rank: 1 = likeliest. top: the likeliest tokens, (id, logprob), as many as whoever asked for most in that
    step wanted or as there are. All values are finite: -9999.0 stands for a token that could not come."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class TokenScores(msgspec.Struct, frozen=True, kw_only=True):
    """Logprobs of L tokens as columns; the tokens of one request stand in their order.

    request_ids: int64 bytes. token_ids, ranks: int32 bytes. logprobs: float32 bytes. top_ids, top_logprobs: int32 and float32 bytes
    [L, width], likeliest first, -1 where the vocabulary has no more.
    """

    request_ids: bytes
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    top_ids: bytes
    top_logprobs: bytes
    width: int

    def entries(self) -> Iterator[tuple[int, TokenLogprob]]:
        """(request id, what is known of its next token), token by token."""
        request_ids = np.frombuffer(self.request_ids, "<i8").tolist()
        columns = (
            np.frombuffer(self.token_ids, "<i4").tolist(),
            np.maximum(np.frombuffer(self.logprobs, "<f4"), LEAST_LOGPROB).tolist(),
            np.frombuffer(self.ranks, "<i4").tolist(),
            np.frombuffer(self.top_ids, "<i4").reshape(len(request_ids), self.width).tolist(),
            np.maximum(np.frombuffer(self.top_logprobs, "<f4"), LEAST_LOGPROB)
            .reshape(len(request_ids), self.width)
            .tolist(),
        )
        for request_id, token_id, logprob, rank, ids, logprobs in zip(request_ids, *columns, strict=True):
            top = [pair for pair in zip(ids, logprobs, strict=True) if pair[0] >= 0]
            yield request_id, TokenLogprob(token_id, logprob, rank, top)


class StepOutputs(msgspec.Struct, tag="step", frozen=True, kw_only=True):
    """All tokens of one step, packed: entry i is one token (or the end without a token) of request_ids[i].

    request_ids: int64 bytes. token_ids: int32 bytes, -1 = no token (ended by ERROR, EXPIRED or by a limit hit before a token).
    finish: uint8 bytes of FinishReason. cached: int32 bytes, prompt tokens taken from the prefix cache, valid on a request's
    first entry. stats: the engine's gauges after the step.
    begun: int64 bytes, requests of which the engine planned the first step since the last message, and begun_s: float64 bytes, when
    (time.perf_counter()).
    scores: of those of these tokens whose requests asked for logprobs. prompt_scores: of tokens of prompts, each after its predecessor
    and never twice; all of a prompt (but its first token, which nothing predicts) have come by its request's first entry.
    vectors: float32 bytes [entries, width], where the engine pools: one for each entry (each is a request's end); else empty.
    """

    request_ids: bytes
    token_ids: bytes
    finish: bytes
    cached: bytes
    stats: EngineStats
    begun: bytes = b""
    begun_s: bytes = b""
    scores: TokenScores | None = None
    prompt_scores: TokenScores | None = None
    vectors: bytes = b""


class Rejected(msgspec.Struct, tag="rejected", frozen=True, kw_only=True):
    """The engine refuses a Submit as a whole (it could never fit); no other output follows for its ids."""

    request_id: int
    message: str
    param: str | None
    status: int


class Pong(msgspec.Struct, tag="pong", frozen=True):
    nonce: int
    stats: EngineStats


class Fatal(msgspec.Struct, tag="fatal", frozen=True, kw_only=True):
    """The engine is about to exit. config_error: the user can mend it (exit status 2), else it is a failure (status 1)."""

    message: str
    config_error: bool


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters of one engine since start; counters end in _total."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0  # free to take at once, cached or not
    num_blocks: int = 0
    num_steps_total: int = 0
    prompt_tokens_total: int = 0  # computed or taken from the cache
    cached_prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    compiles_after_ready_total: int = 0


ToEngine = Submit | Abort | Ping | Shutdown
FromEngine = Ready | StepOutputs | Rejected | Pong | Fatal

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def pack_tokens(token_ids: list[int] | npt.NDArray[np.integer]) -> bytes:
    """Token ids as little-endian int32 bytes."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def unpack_tokens(data: bytes) -> npt.NDArray[np.int32]:
    """The read-only int32 array behind `pack_tokens`."""
    return np.frombuffer(data, dtype="<i4")
