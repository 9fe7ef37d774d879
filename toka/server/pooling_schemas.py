"""Bodies and replies of the routes that make vectors and scores of prompts; see schemas.py for the rules."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

# ------------------------------------------------------------------------------------------------------------- requests


class PoolingFields(msgspec.Struct, kw_only=True):
    """What these routes have in common."""

    model: str = "default"
    truncate_prompt_tokens: (
        Annotated[
            int,
            Meta(
                description="Cut prompts at their end to so many tokens; -1 = to what the model holds; else too long ones are refused."
            ),
        ]
        | UnsetType
    ) = UNSET
    priority: Annotated[int, Meta(description="Lower runs earlier.")] = 0
    user: Annotated[str, Meta(description="A label; changes nothing.")] = ""


class EmbeddingRequest(PoolingFields, kw_only=True):
    """POST /v1/embeddings."""

    input: Annotated[
        str | list[str | int | list[int]],
        Meta(description="A text, several texts, token ids, or several lists of token ids."),
    ]
    encoding_format: Annotated[Literal["float", "base64"], Meta(description="base64: of little-endian float32.")] = (
        "float"
    )
    dimensions: Annotated[int, Meta(description="Keep so many numbers of each vector.")] | UnsetType = UNSET
    normalize: (
        Annotated[bool, Meta(description="Bring vectors to length 1; left out: as the model wants it.")] | UnsetType
    ) = UNSET
    add_special_tokens: Annotated[
        bool, Meta(description="Put special tokens around texts where the model wants them.")
    ] = True


class ScoreRequest(PoolingFields, kw_only=True):
    """POST /v1/score: text_1 to text_2, one to one, one to each of several, or pair by pair."""

    text_1: str | list[str]
    text_2: str | list[str]


class DocumentText(msgspec.Struct, forbid_unknown_fields=True):
    """A document of which only the text is looked at."""

    text: str


class RerankRequest(PoolingFields, kw_only=True):
    """POST /v1/rerank: the documents by how well they answer the query, best first; as Jina and Cohere have it."""

    query: str
    documents: Annotated[list[str | DocumentText], Meta(min_length=1)]
    top_n: Annotated[int, Meta(description="So many results at most; 0 = all.")] = 0
    return_documents: Annotated[bool, Meta(description="Give the documents' texts back.")] = True


# -------------------------------------------------------------------------------------------------------------- replies


class PromptUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct):
    """embedding: the numbers, or their bytes (little-endian float32) in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingReply(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: PromptUsage
    object: Literal["list"] = "list"


class Score(msgspec.Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreReply(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage
    object: Literal["list"] = "list"


class RerankResult(msgspec.Struct, omit_defaults=True):
    """index: of the document in the request."""

    index: int
    relevance_score: float
    document: DocumentText | UnsetType = UNSET


class RerankReply(msgspec.Struct):
    id: str
    model: str
    results: list[RerankResult]
    usage: PromptUsage
