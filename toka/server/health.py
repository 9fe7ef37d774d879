"""GET /health, /ready, /metrics, /version: for load balancers, orchestrators and dashboards."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from toka.errors import CapacityError
from toka.metrics import CONTENT_TYPE
from toka.server.engine_client import RETRY_AFTER_S
from toka.server.serving import VERSION, serving_of

MIN_HEALTH_TIMEOUT_S = 10.0
_STEPS_OF_PATIENCE = 4  # an engine answers between steps, of which several of the longest may be under way
_STATS_TIMEOUT_S = 1.0

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 if the engine's loop answers; 503 while it warms up, hangs, or is gone."""
    engine = serving_of(request).engine
    if engine.dead is None and engine.ready is None:
        raise CapacityError("The engine is warming up.", status=503, retry_after_s=RETRY_AFTER_S)
    longest_step_s = 0.0 if engine.ready is None else engine.ready.longest_step_s
    await engine.ping(max(MIN_HEALTH_TIMEOUT_S, _STEPS_OF_PATIENCE * longest_step_s))
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 if requests are taken now: the warmup is over, the engine lives, and the server is not shutting down."""
    serving = serving_of(request)
    serving.check_admission()
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    serving = serving_of(request)
    await serving.engine.refresh_stats(_STATS_TIMEOUT_S)  # an idle engine's last step still counted its last request
    return Response(serving.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/version")
async def version() -> dict[str, str]:
    """toka's version."""
    return {"version": VERSION}
