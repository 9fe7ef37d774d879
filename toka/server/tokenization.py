"""POST /tokenize, POST /detokenize, GET /tokenizer_info: as vLLM has them, which lm-evaluation-harness looks for."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from toka.errors import RequestError
from toka.server.body import read_body
from toka.server.conversation import Conversation, ToolUse, adds_generation_prompt, messages_of, prepare, tools_of
from toka.server.openapi import describe
from toka.server.schemas import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest
from toka.server.serving import Serving, serving_of

router = APIRouter()


@router.post("/tokenize", openapi_extra=describe(TokenizeRequest, TokenizeReply))
async def tokenize(request: Request) -> Response:
    """Token ids of a text or of a conversation."""
    serving = serving_of(request)
    body = await read_body(request, TokenizeRequest)
    serving.check_model(body.model)
    tokens = await _tokens(serving, body)
    strings = [serving.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    reply = TokenizeReply(len(tokens), serving.max_request_tokens, tokens, strings)
    return Response(msgspec.json.encode(reply), media_type="application/json")


async def _tokens(serving: Serving, body: TokenizeRequest) -> list[int]:
    if body.messages is not UNSET:
        if body.prompt is not UNSET:
            raise RequestError("prompt and messages exclude each other.", "messages")
        conversation = Conversation(
            messages_of(body.messages),
            ToolUse(tools_of(body.tools)),
            add_generation_prompt=adds_generation_prompt(body),
            continue_final_message=body.continue_final_message,
            template=None if body.chat_template is UNSET else body.chat_template,
            variables=body.chat_template_kwargs,
        )
        prompt = await prepare(serving, conversation, add_special_tokens=body.add_special_tokens is True)
        return prompt.token_ids
    if body.prompt is UNSET:
        raise RequestError("prompt is required.", "prompt")
    [tokens] = await serving.encode([body.prompt], "prompt", add_special_tokens=body.add_special_tokens is not False)
    return tokens


@router.post("/detokenize", openapi_extra=describe(DetokenizeRequest, DetokenizeReply))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    serving = serving_of(request)
    body = await read_body(request, DetokenizeRequest)
    serving.check_model(body.model)
    serving.check_token_ids(body.tokens, "tokens", serving.tokenizer.vocab_size)
    text = await serving.decode(body.tokens)
    return Response(msgspec.json.encode(DetokenizeReply(text)), media_type="application/json")


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, object]:
    """Special tokens and chat template."""
    serving = serving_of(request)
    return {**serving.tokenizer.info(), "model_max_length": serving.max_request_tokens}
