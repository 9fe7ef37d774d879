"""From a Submit to its samples' requests: everything is checked here, so that what is queued can always run to its end."""

from __future__ import annotations

import math

from toka.errors import RequestError
from toka.messages import Submit, unpack_tokens
from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import I32
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.prefix_index import KeyChain
from toka.scheduler.request import Rank, Request, Waiting
from toka.scheduler.request_table import MAX_STOP_IDS_PER_ROW

PATIENCE_S = 60.0  # a request without a deadline takes its turn as if it had this one, so that deadlines starve nobody


def samples_of(submit: Submit, config: SchedulerConfig, secret: bytes, first_arrival: int) -> list[Waiting]:
    """The `sampling.n` requests of a Submit whose sampling is checked, arrivals first_arrival and up.

    Raises RequestError if it is malformed or could never fit. The prompt's blocks are hashed once for all samples.
    """
    prompt = unpack_tokens(submit.prompt)
    _check(submit, prompt, config)
    sampling = submit.sampling
    max_tokens = config.max_tokens_per_request - len(prompt) if sampling.max_tokens is None else sampling.max_tokens
    due_s = submit.arrival_s + min(submit.deadline_s, PATIENCE_S)
    chain = KeyChain(secret, submit.cache_salt, config.block_size)
    if config.prefix_cache:
        chain.extend(prompt, len(prompt) // config.block_size)
    return [
        Waiting(
            Request(
                request_id=submit.request_id + sample,
                rank=Rank(submit.priority, due_s, first_arrival + sample),
                deadline_s=submit.arrival_s + submit.deadline_s,
                comes_back=bool(submit.session_id),
                sampling=sampling,
                stop_token_ids=submit.stop_token_ids,
                seed=submit.seed + sample,
                num_prompt_tokens=len(prompt),
                max_total_tokens=len(prompt) + max_tokens,
                chain=chain.fork(),
                scores_prompt=sampling.prompt_logprobs is not None and sample == 0,  # the others' prompt is the same
            ),
            prompt,
        )
        for sample in range(sampling.n)
    ]


def _check(submit: Submit, prompt: I32, config: SchedulerConfig) -> None:
    sampling, limit = submit.sampling, config.max_tokens_per_request
    if not len(prompt):
        raise RequestError("The prompt is empty: it must have at least one token.", "prompt")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise RequestError(f"The prompt has token ids outside 0..{config.vocab_size - 1}.", "prompt")
    if len(prompt) + (sampling.max_tokens or 1) > limit:
        asked = "" if sampling.max_tokens is None else f" and max_tokens is {sampling.max_tokens}"
        raise RequestError(
            f"This server holds at most {limit} tokens per request; the prompt has {len(prompt)}{asked}.",
            "prompt" if len(prompt) >= limit else "max_tokens",
            code="context_length_exceeded",
        )
    if not -(2**63) <= submit.priority < 2**63:
        raise RequestError(f"priority must fit in 64 bits, got {submit.priority}.", "priority")
    if not math.isfinite(submit.arrival_s):
        raise RequestError(f"arrival_s must be a finite number, got {submit.arrival_s}.", "arrival_s")
    if not submit.deadline_s > 0.0:
        raise RequestError(f"deadline_s must be above 0, got {submit.deadline_s}.", "deadline_s")
    if sampling.min_tokens > limit - len(prompt):
        raise RequestError(
            f"min_tokens is {sampling.min_tokens}, the context has room for {limit - len(prompt)} after the prompt.",
            "min_tokens",
            code="context_length_exceeded",
        )
    max_stop_ids = MAX_STOP_TOKEN_IDS if sampling.min_tokens else MAX_STOP_IDS_PER_ROW
    if len(submit.stop_token_ids) > max_stop_ids:
        with_min_tokens = " with min_tokens" if sampling.min_tokens else ""
        raise RequestError(
            f"At most {max_stop_ids} stop token ids{with_min_tokens}, got {len(submit.stop_token_ids)} "
            "(the model's own end tokens are among them).",
            "stop_token_ids",
        )
