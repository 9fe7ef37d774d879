"""GET / and GET /status: a page for people, and what it shows of the engine.

The page is one file without a build step. Its policy forbids it everything but its own style and script and calls to this server.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from importlib import resources

import msgspec
from fastapi import APIRouter, Request, Response

from toka.metrics import kv_cache_usage
from toka.server.openapi import describe
from toka.server.serving import VERSION, Serving, serving_of

_STATS_TIMEOUT_S = 1.0

router = APIRouter()


class ModelFacts(msgspec.Struct):
    """Those of the engine are null until it is ready."""

    id: str
    version: str
    dtype: str | None
    device: str | None
    max_model_len: int | None
    vocab_size: int | None
    num_kv_blocks: int | None
    block_size: int | None


class EngineFacts(msgspec.Struct):
    """Gauges of now, and counters since the start. kv_cache_usage: 0..1."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    steps_total: int
    prompt_tokens_total: int
    cached_prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    compiles_after_ready_total: int


class Status(msgspec.Struct):
    """state: "warming up", "ready", "draining" or "failed"."""

    state: str
    uptime_s: float
    model: ModelFacts
    engine: EngineFacts


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return Response(_PAGE, media_type="text/html; charset=utf-8", headers=_HEADERS)


@router.get("/status", openapi_extra=describe(None, Status))
async def status(request: Request) -> Response:
    """The state of the server in figures."""
    serving = serving_of(request)
    await serving.engine.refresh_stats(_STATS_TIMEOUT_S)
    found = Status(_state(serving), time.time() - serving.created, _model_facts(serving), _engine_facts(serving))
    return Response(msgspec.json.encode(found), media_type="application/json")


@router.get("/status/report")
async def report(request: Request) -> dict[str, object]:
    """What the warmup did: seconds per phase, memory, kernels, step sizes. CapacityError (503) before it is over."""
    return serving_of(request).check_admission().report


def _state(serving: Serving) -> str:
    if serving.engine.dead is not None:
        return "failed"
    if serving.draining:
        return "draining"
    return "warming up" if serving.engine.ready is None else "ready"


def _model_facts(serving: Serving) -> ModelFacts:
    ready = serving.engine.ready
    if ready is None:
        return ModelFacts(serving.model_id, VERSION, None, None, None, None, None, None)
    return ModelFacts(
        serving.model_id,
        VERSION,
        ready.dtype,
        ready.device,
        ready.max_request_tokens,
        ready.vocab_size,
        ready.num_kv_blocks,
        ready.block_size,
    )


def _engine_facts(serving: Serving) -> EngineFacts:
    stats = serving.engine.stats
    return EngineFacts(
        stats.num_running,
        stats.num_waiting,
        kv_cache_usage(stats),
        stats.num_steps_total,
        stats.prompt_tokens_total,
        stats.cached_prompt_tokens_total,
        stats.generation_tokens_total,
        stats.preemptions_total,
        stats.compiles_after_ready_total,
    )


def _policy(page: bytes) -> str:
    """The page's Content-Security-Policy; its own style and script are allowed by their hashes."""

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)

    return (
        f"default-src 'none'; style-src {hashes(b'style')}; script-src {hashes(b'script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_PAGE = resources.files("toka.server").joinpath("static/index.html").read_bytes()
_HEADERS = {
    "content-security-policy": _policy(_PAGE),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
