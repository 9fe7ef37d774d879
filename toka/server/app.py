"""The application: every endpoint family, the error replies and the guard around them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

from toka.server import chat_completions, completions, embeddings, health, models, scores, tokenization
from toka.server.error_replies import add_error_handlers
from toka.server.guard import Guard
from toka.server.openapi import add_openapi
from toka.server.serving import VERSION, Serving


def create_app(serving: Serving) -> ASGIApp:
    """The ASGI application that serves `serving`."""
    app = FastAPI(title="toka", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.serving = serving
    for family in (completions, chat_completions, embeddings, scores, models, tokenization, health):
        app.include_router(family.router)
    add_error_handlers(app)
    add_openapi(app)
    return Guard(app, serving.config.effective_api_key())
