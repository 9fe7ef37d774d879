"""The application: every endpoint family, the error replies and the guard around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from toka.server import abort, chat_completions, completions, health, models, tokenization
from toka.server.error_replies import add_error_handlers
from toka.server.guard import Guard
from toka.server.openapi import add_openapi
from toka.server.serving import VERSION, Serving


def create_app(serving: Serving) -> ASGIApp:
    """The ASGI application that serves `serving`."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        if serving.tracer is not None:
            await asyncio.to_thread(serving.tracer.close)

    app = FastAPI(
        title="toka", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    app.state.serving = serving
    for family in (completions, chat_completions, abort, models, tokenization, health):
        app.include_router(family.router)
    add_error_handlers(app)
    add_openapi(app)
    guarded = Guard(app, serving.config, serving.keys, serving.metrics)
    origins = serving.config.allowed_origins()
    return _with_cors(guarded, origins) if origins else guarded


def _with_cors(app: ASGIApp, origins: list[str]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", "x-should-retry"],
    )
