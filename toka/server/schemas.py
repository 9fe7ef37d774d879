"""What clients may send and what they get back: the one place that lists the fields.

A request field is in one of three lists: supported (a field of the struct), neutral (known, not built yet, accepted only with
the value that changes nothing) or unknown. Anything but the first two is refused by name with 400. OpenAPI is made from these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from toka.server.pooling_schemas import EmbeddingRequest, RerankRequest, ScoreRequest

# ------------------------------------------------------------------------------------------------------------- requests


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage and no choices."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class GenerationFields(msgspec.Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: str = "default"
    max_tokens: Annotated[int, Meta(description="Tokens to generate at most.")] | UnsetType = UNSET
    temperature: Annotated[float, Meta(description="0 = greedy.")] = 1.0
    top_p: Annotated[float, Meta(description="Keep the likeliest tokens up to this probability; 1 = off.")] = 1.0
    top_k: Annotated[int, Meta(description="Keep this many tokens; 0 or -1 = off.")] = 0
    min_p: Annotated[float, Meta(description="Drop tokens below this share of the likeliest one's probability.")] = 0.0
    seed: Annotated[int, Meta(description="Same seed, same request = same tokens.")] | UnsetType = UNSET
    n: Annotated[int, Meta(description="Independent samples per prompt.")] = 1
    stop: Annotated[str | list[str], Meta(description="Strings that end the text; not part of it.")] = msgspec.field(
        default_factory=list
    )
    stop_token_ids: Annotated[list[int], Meta(description="Token ids that end the text.")] = msgspec.field(
        default_factory=list
    )
    ignore_eos: Annotated[bool, Meta(description="Go on past the model's end-of-sequence tokens.")] = False
    min_tokens: Annotated[int, Meta(description="No stop before so many tokens.")] = 0
    prompt_logprobs: (
        Annotated[int, Meta(description="Logprobs of the prompt's tokens, and so many of the likeliest; 0 to 20.")]
        | UnsetType
    ) = UNSET
    cache_salt: Annotated[str, Meta(description="Share cached prefixes only under the same salt.")] = ""
    priority: Annotated[int, Meta(description="Lower runs earlier, and in place of higher ones that run.")] = 0
    deadline_s: (
        Annotated[
            float,
            Meta(
                description="Seconds within which the request must begin to run, or it is refused with 503; within a priority, the "
                "earliest deadline goes first."
            ),
        ]
        | UnsetType
    ) = UNSET
    session_id: Annotated[
        str,
        Meta(description="The same for all turns of a conversation: its cached prefix is kept longer between them."),
    ] = ""
    user: Annotated[str, Meta(description="A label; changes nothing.")] = ""
    safety_identifier: Annotated[str, Meta(description="A label; changes nothing.")] = ""
    stream: bool = False
    stream_options: StreamOptions | UnsetType = UNSET


# A list may hold texts, one prompt's token ids, or several prompts' token ids; `prompts_of` tells them apart.
Prompt = str | list[str | int | list[int]]


class CompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/completions."""

    prompt: Annotated[Prompt, Meta(description="A text, several texts, token ids, or several lists of token ids.")]
    logprobs: (
        Annotated[int, Meta(description="Logprobs of the tokens, and so many of the likeliest; 0 to 20.")] | UnsetType
    ) = UNSET
    echo: Annotated[bool, Meta(description="Begin the text with the prompt; with logprobs, of its tokens too.")] = False
    add_special_tokens: Annotated[bool, Meta(description="Put BOS before a text prompt where the model wants it.")] = (
        True
    )


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of the conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None


class ChatCompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    logprobs: Annotated[bool, Meta(description="Tell the logprobs of the tokens.")] = False
    top_logprobs: Annotated[int, Meta(description="And those of so many of the likeliest; 0 to 20.")] | UnsetType = (
        UNSET
    )
    max_completion_tokens: Annotated[int, Meta(description="The newer name of max_tokens.")] | UnsetType = UNSET
    add_generation_prompt: Annotated[bool, Meta(description="End the prompt with the assistant's header.")] = True
    chat_template_kwargs: Annotated[dict[str, Any], Meta(description="Variables for the chat template.")] = (
        msgspec.field(default_factory=dict)
    )


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: either prompt or messages."""

    model: str = "default"
    prompt: str | UnsetType = UNSET
    messages: list[ChatMessage] | UnsetType = UNSET
    add_special_tokens: bool | UnsetType = UNSET
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str = "default"
    tokens: list[int]


_NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}

# Fields that are known but not built yet, with the values that change nothing; null is always one of them.
NEUTRAL_VALUES: dict[type[msgspec.Struct], dict[str, tuple[Any, ...]]] = {
    CompletionRequest: {
        **_NEUTRAL_GENERATION,
        "best_of": (),
        "suffix": ("",),
    },
    ChatCompletionRequest: {
        **_NEUTRAL_GENERATION,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": (),
        "echo": (False,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
    },
    TokenizeRequest: {"continue_final_message": (False,), "chat_template": (), "tools": ([],)},
    DetokenizeRequest: {},
    EmbeddingRequest: {"metadata": ({},)},
    ScoreRequest: {},
    RerankRequest: {"rank_fields": ([],), "max_tokens_per_doc": (), "max_chunks_per_doc": ()},
}

# -------------------------------------------------------------------------------------------------------------- replies


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of the request; a prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct):
    """One entry a token; null for a prompt's first token, which nothing predicts. -9999.0 stands for a probability of 0.

    text_offset: characters of the choice's text before the token. top_logprobs: the likeliest tokens, and the token itself.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptTokenLogprob(msgspec.Struct):
    """rank: 1 = likeliest."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]
"""For each token of a prompt, by token id; null for the first."""


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["text_completion"] = "text_completion"


class AssistantMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class TopLogprob(msgspec.Struct):
    """bytes: of the token's text; a token may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Model(msgspec.Struct):
    id: str
    created: int
    root: str
    max_model_len: int | None
    object: Literal["model"] = "model"
    owned_by: str = "toka"
    parent: None = None


class ModelList(msgspec.Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class TokenizeReply(msgspec.Struct):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(msgspec.Struct):
    prompt: str


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    error: ErrorDetail
