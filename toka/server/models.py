"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from toka.server.openapi import describe
from toka.server.schemas import Model, ModelList
from toka.server.serving import Serving, serving_of

router = APIRouter()


@router.get("/v1/models", openapi_extra=describe(None, ModelList))
async def list_models(request: Request) -> Response:
    """The names under which the model can be asked for."""
    serving = serving_of(request)
    models = ModelList([_model(serving, name) for name in serving.model_names])
    return Response(msgspec.json.encode(models), media_type="application/json")


@router.get("/v1/models/{model_id:path}", openapi_extra=describe(None, Model))
async def retrieve_model(request: Request, model_id: str) -> Response:
    """One of them."""
    serving = serving_of(request)
    model = _model(serving, serving.check_model(model_id))
    return Response(msgspec.json.encode(model), media_type="application/json")


def _model(serving: Serving, name: str) -> Model:
    return Model(name, serving.created, serving.model_id, serving.max_request_tokens)
