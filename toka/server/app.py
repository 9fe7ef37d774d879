"""The application: every endpoint family, the error replies and the guard around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from toka.server import (
    abort,
    batches,
    chat_completions,
    completions,
    embeddings,
    files,
    health,
    messages,
    models,
    page,
    responses,
    scores,
    tokenization,
)
from toka.server.batch_runner import BatchRunner
from toka.server.error_replies import add_error_handlers
from toka.server.guard import Guard
from toka.server.openapi import add_openapi
from toka.server.serving import VERSION, Serving
from toka.server.store import Store

_FAMILIES = (
    completions,
    chat_completions,
    responses,
    messages,
    embeddings,
    scores,
    abort,
    files,
    batches,
    models,
    tokenization,
    health,
    page,
)
# Those of these that the application has may be asked in batches.
_BATCH_ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/score",
    "/v1/rerank",
)
_DEFAULT_MAX_STORED_BYTES = 10 * 2**30


def create_app(serving: Serving) -> ASGIApp:
    """The ASGI application that serves `serving`. Raises ConfigError if the data directory cannot be used."""
    config = serving.config
    app = FastAPI(
        title="toka", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=_lifespan
    )
    app.state.serving = serving
    for family in _FAMILIES:
        app.include_router(family.router)
    add_error_handlers(app)
    add_openapi(app)
    app.state.store = None
    if config.data_dir is not None:
        app.state.store = Store(config.data_dir, config.max_stored_bytes or _DEFAULT_MAX_STORED_BYTES)
        paths = {getattr(route, "path", "") for family in _FAMILIES for route in family.router.routes}
        endpoints = tuple(path for path in _BATCH_ENDPOINTS if path in paths)
        app.state.batch_runner = BatchRunner(app.state.store, app, serving, endpoints)
    guarded = Guard(app, config, serving.keys, serving.metrics)
    origins = config.allowed_origins()
    return _with_cors(guarded, origins) if origins else guarded


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """What runs beside the requests."""
    serving: Serving = app.state.serving
    runner: BatchRunner | None = app.state.batch_runner if app.state.store is not None else None
    if runner is not None:
        await runner.start()
    yield
    if runner is not None:
        await runner.close()
    if serving.tracer is not None:
        await asyncio.to_thread(serving.tracer.close)


def _with_cors(app: ASGIApp, origins: list[str]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", "x-should-retry"],
    )
