"""What clients may send and what they get back: the one place that lists the fields.

A request field is in one of three lists: supported (a field of the struct), neutral (known, not built yet, accepted only with
the value that changes nothing) or unknown. Anything but the first two is refused by name with 400. OpenAPI is made from these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from toka.server.pooling_schemas import EmbeddingRequest, RerankRequest, ScoreRequest

MAX_TOOLS = 128

# ------------------------------------------------------------------------------------------------------------- requests


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage and no choices. continuous_usage_stats: every chunk tells the usage so far."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: bool = False


class NamedJsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """strict changes nothing: the text always fits the schema."""

    name: str
    description: str | None = None
    schema: dict[str, Any] = msgspec.field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text has to be: anything, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedJsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text has to be; exactly one of them."""

    json: Annotated[dict[str, Any] | str, Meta(description="A JSON schema, or its text.")] | None = None
    regex: Annotated[str, Meta(description="A regular expression for the whole text.")] | None = None
    choice: Annotated[list[str], Meta(description="Texts of which it is one.")] | None = None
    grammar: Annotated[str, Meta(description="A context-free grammar in Lark's notation or GBNF.")] | None = None


class GenerationFields(msgspec.Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: str = "default"
    max_tokens: Annotated[int, Meta(description="Tokens to generate at most.")] | UnsetType = UNSET
    temperature: Annotated[float, Meta(description="0 = greedy.")] = 1.0
    top_p: Annotated[float, Meta(description="Keep the likeliest tokens up to this probability; 1 = off.")] = 1.0
    top_k: Annotated[int, Meta(description="Keep this many tokens; 0 or -1 = off.")] = 0
    min_p: Annotated[float, Meta(description="Drop tokens below this share of the likeliest one's probability.")] = 0.0
    presence_penalty: Annotated[float, Meta(description="Taken off logits of tokens generated before; -2 to 2.")] = 0.0
    frequency_penalty: Annotated[float, Meta(description="The same for each time that they were; -2 to 2.")] = 0.0
    repetition_penalty: Annotated[
        float,
        Meta(description="Divides logits of tokens that the prompt or the text has (below 0: multiplies); 1 = off."),
    ] = 1.0
    logit_bias: Annotated[dict[str, float], Meta(description="Token id: what is added to its logit, -100 to 100.")] = (
        msgspec.field(default_factory=dict)
    )
    bad_words: Annotated[list[str], Meta(description="Words that are not generated.")] = msgspec.field(
        default_factory=list
    )
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
    response_format: ResponseFormat | UnsetType = UNSET
    structured_outputs: StructuredOutputs | UnsetType = UNSET
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
    truncate_prompt_tokens: (
        Annotated[int, Meta(description="Keep only so many tokens of the prompt, its last ones; -1 = as many as fit.")]
        | UnsetType
    ) = UNSET
    return_token_ids: Annotated[bool, Meta(description="Tell the ids of the prompt's and the generated tokens.")] = (
        False
    )
    return_timings: Annotated[bool, Meta(description="Tell how long the request took, in seconds.")] = False
    metadata: Annotated[dict[str, str], Meta(max_length=16, description="Labels; change nothing.")] = msgspec.field(
        default_factory=dict
    )
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
    best_of: (
        Annotated[int, Meta(description="Generate so many, answer with the n likeliest per token; not with stream.")]
        | UnsetType
    ) = UNSET
    echo: Annotated[bool, Meta(description="Begin the text with the prompt; with logprobs, of its tokens too.")] = False
    add_special_tokens: Annotated[bool, Meta(description="Put BOS before a text prompt where the model wants it.")] = (
        True
    )


class TextPart(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message's content; only text is understood."""

    text: str


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """arguments: JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call that the assistant made. index: as in a stream's deltas; not needed."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | UnsetType | None = UNSET


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of the conversation. tool_call_id: of the call that a message of the role tool answers.

    reasoning, reasoning_content: two names of the same, the assistant's reasoning before its content.
    """

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class FunctionDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """parameters: the JSON schema of the arguments. strict: the arguments are held to it even if no tool need be called."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the model may call; only functions are known."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """The one tool that must be called."""

    function: NamedFunction


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    """mode: as tool_choice, among these tools only."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


AddGenerationPrompt = Annotated[bool, Meta(description="End the prompt with the assistant's header; so by default.")]
ContinueFinalMessage = Annotated[
    bool, Meta(description="Go on in the middle of the last message, which must be the assistant's.")
]
ChatTemplateSource = Annotated[str, Meta(description="In place of the model's own, where the server allows it.")]
TemplateVariables = Annotated[dict[str, Any], Meta(description="Variables for the chat template.")]
ReasoningEffort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh"],
    Meta(description="For models whose chat template knows of it; none also for those that can skip reasoning."),
]


class ChatCompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    add_generation_prompt: AddGenerationPrompt | UnsetType = UNSET
    continue_final_message: ContinueFinalMessage = False
    chat_template: ChatTemplateSource | UnsetType = UNSET
    chat_template_kwargs: TemplateVariables = msgspec.field(default_factory=dict)
    tools: Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    tool_choice: ToolChoice | UnsetType = UNSET
    parallel_tool_calls: Annotated[bool, Meta(description="False: one call at most.")] = True
    logprobs: Annotated[bool, Meta(description="Tell the logprobs of the tokens.")] = False
    top_logprobs: Annotated[int, Meta(description="And those of so many of the likeliest; 0 to 20.")] | UnsetType = (
        UNSET
    )
    max_completion_tokens: Annotated[int, Meta(description="The newer name of max_tokens.")] | UnsetType = UNSET
    reasoning_effort: (
        Annotated[
            Literal["none", "minimal", "low", "medium", "high", "xhigh"],
            Meta(
                description="For models whose chat template knows of it; none also for those that can skip reasoning."
            ),
        ]
        | UnsetType
    ) = UNSET
    reasoning_budget: (
        Annotated[int, Meta(ge=0, description="Tokens of reasoning at most; then its end is forced.")] | UnsetType
    ) = UNSET
    thinking_token_budget: Annotated[int, Meta(ge=0, description="Another name of it.")] | UnsetType = UNSET


class ResponseTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool as the Responses API has it; only functions are known."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """The one tool that must be called, or one of those allowed."""

    name: str


class AllowedResponseTools(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: list[NamedResponseTool]


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class SchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that fits the schema. name, description: labels."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text of the response must be."""

    format: TextFormat | JsonObjectFormat | SchemaFormat = msgspec.field(default_factory=TextFormat)
    verbosity: Literal["medium"] | None = None


class ResponseReasoning(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """effort: as reasoning_effort. Reasoning is told as it is, never summarised."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponsesStreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: Literal[False] = False


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses. Nothing is stored: the conversation comes whole with each request."""

    model: str = "default"
    input: Annotated[
        str | list[dict[str, Any]], Meta(description="A text, or messages, calls, their outputs, reasoning.")
    ]
    instructions: Annotated[str, Meta(description="The system message.")] | UnsetType = UNSET
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | AllowedResponseTools = "auto"
    parallel_tool_calls: Annotated[bool, Meta(description="False: one call at most.")] = True
    text: ResponseText = msgspec.field(default_factory=ResponseText)
    reasoning: ResponseReasoning = msgspec.field(default_factory=ResponseReasoning)
    max_output_tokens: Annotated[int, Meta(description="Tokens to generate at most.")] | UnsetType = UNSET
    temperature: Annotated[float, Meta(description="0 = greedy.")] = 1.0
    top_p: Annotated[float, Meta(description="Keep the likeliest tokens up to this probability; 1 = off.")] = 1.0
    top_k: Annotated[int, Meta(description="Keep this many tokens; 0 or -1 = off.")] = 0
    min_p: Annotated[float, Meta(description="Drop tokens below this share of the likeliest one's probability.")] = 0.0
    seed: Annotated[int, Meta(description="Same seed, same request = same tokens.")] | UnsetType = UNSET
    reasoning_budget: (
        Annotated[int, Meta(ge=0, description="Tokens of reasoning at most; then its end is forced.")] | UnsetType
    ) = UNSET
    chat_template_kwargs: TemplateVariables = msgspec.field(default_factory=dict)
    cache_salt: Annotated[str, Meta(description="Share cached prefixes only under the same salt.")] = ""
    priority: Annotated[int, Meta(description="Lower runs earlier, and in place of higher ones that run.")] = 0
    metadata: Annotated[dict[str, str], Meta(max_length=16, description="Labels; change nothing.")] = msgspec.field(
        default_factory=dict
    )
    user: Annotated[str, Meta(description="A label; changes nothing.")] = ""
    safety_identifier: Annotated[str, Meta(description="A label; changes nothing.")] = ""
    stream: bool = False
    stream_options: ResponsesStreamOptions | UnsetType = UNSET


class CacheControl(msgspec.Struct, forbid_unknown_fields=True):
    """A hint that needs no heeding: prefixes are cached by themselves."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ThinkingBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="thinking"):
    """The assistant's reasoning in an earlier turn. signature: of no meaning here."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_use"):
    """A call that the assistant made."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_result"):
    """What came of a call."""

    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False
    cache_control: CacheControl | None = None


class Turn(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message as Anthropic's API has it."""

    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]


class MessagesTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the client runs; there are no others."""

    name: FunctionName
    input_schema: dict[str, Any]
    description: str = ""
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class MessagesToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """any: some tool must be called; tool: the one of this name."""

    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """enabled: at most budget_tokens tokens of reasoning. adaptive: as the model likes. disabled: none."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: None = None


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text of the reply must be; only a JSON schema is known."""

    format: SchemaFormat | None = None
    effort: None = None


class MessagesMetadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens: how long the prompt of a conversation is."""

    model: str = "default"
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: str | list[TextBlock] = ""
    tools: Annotated[list[MessagesTool], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    tool_choice: MessagesToolChoice | UnsetType = UNSET
    thinking: Thinking | UnsetType = UNSET
    output_config: OutputConfig | UnsetType = UNSET
    cache_control: CacheControl | UnsetType = UNSET


class MessagesRequest(CountTokensRequest, kw_only=True):
    """POST /v1/messages, Anthropic's API. A last message of the assistant is continued."""

    max_tokens: Annotated[int, Meta(description="Tokens to generate at most.")]
    temperature: Annotated[float, Meta(description="0 = greedy.")] = 1.0
    top_p: Annotated[float, Meta(description="Keep the likeliest tokens up to this probability; 1 = off.")] = 1.0
    top_k: Annotated[int, Meta(description="Keep this many tokens; 0 = off.")] = 0
    stop_sequences: Annotated[list[str], Meta(description="Strings that end the text; not part of it.")] = (
        msgspec.field(default_factory=list)
    )
    metadata: MessagesMetadata = msgspec.field(default_factory=MessagesMetadata)
    stream: bool = False


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: either prompt or messages."""

    model: str = "default"
    prompt: str | UnsetType = UNSET
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | UnsetType = UNSET
    add_generation_prompt: AddGenerationPrompt | UnsetType = UNSET
    continue_final_message: ContinueFinalMessage = False
    chat_template: ChatTemplateSource | UnsetType = UNSET
    chat_template_kwargs: TemplateVariables = msgspec.field(default_factory=dict)
    tools: Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)] = msgspec.field(default_factory=list)
    add_special_tokens: bool | UnsetType = UNSET
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str = "default"
    tokens: list[int]


class BatchRequest(msgspec.Struct, kw_only=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Annotated[str, Meta(description="Path that every line asks, say /v1/chat/completions.")]
    completion_window: Annotated[str, Meta(description="Time for all lines: 24h, or another with s, m, h or d.")]
    metadata: Annotated[dict[str, str], Meta(description="Labels; change nothing.")] | UnsetType = UNSET


class AbortRequest(msgspec.Struct, kw_only=True):
    """POST /v1/abort."""

    request_id: Annotated[str, Meta(description="The request's x-request-id, or the id of its reply.")]


_NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "return_tokens_as_token_ids": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "store": (False,),
    "service_tier": ("auto", "default"),
}

_NEUTRAL_MESSAGES: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
}

# Fields that are known but not built yet, with the values that change nothing; null is always one of them.
NEUTRAL_VALUES: dict[type[msgspec.Struct], dict[str, tuple[Any, ...]]] = {
    CompletionRequest: {
        **_NEUTRAL_GENERATION,
        "suffix": ("",),
    },
    ChatCompletionRequest: {
        **_NEUTRAL_GENERATION,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": (),
        "web_search_options": (),
        "documents": (),
        "echo": (False,),
        "add_special_tokens": (False,),
    },
    ResponsesRequest: {
        "background": (False,),
        "context_management": (),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    },
    CountTokensRequest: _NEUTRAL_MESSAGES,
    MessagesRequest: _NEUTRAL_MESSAGES,
    TokenizeRequest: {},
    DetokenizeRequest: {},
    AbortRequest: {},
    BatchRequest: {"output_expires_after": ()},
    EmbeddingRequest: {"metadata": ({},)},
    ScoreRequest: {},
    RerankRequest: {"rank_fields": ([],), "max_tokens_per_doc": (), "max_chunks_per_doc": ()},
}

# Fields of old, and what to say instead.
REPLACED_FIELDS = {
    f"guided_{kind}": f'structured_outputs: {{"{kind}": ...}}' for kind in ("json", "regex", "choice", "grammar")
}

# -------------------------------------------------------------------------------------------------------------- replies


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """reasoning_tokens: of the reasoning and its marks; they are among the completion tokens."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Tokens of the request; a prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(msgspec.Struct):
    """Seconds from the arrival of the request to its first token, to its last token (null: there is none), to the end of the reply."""

    first_token_s: float | None
    last_token_s: float | None
    total_s: float


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
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["text_completion"] = "text_completion"
    timings: Timings | UnsetType = UNSET


class AssistantMessage(msgspec.Struct):
    """content: null where there are tool calls and nothing else. reasoning, reasoning_content: the same under both names that clients
    look for; left out where there is none."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


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
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: Literal[0] = 0


class ResponseUsage(msgspec.Struct):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens"]


class ResponseObject(msgspec.Struct, kw_only=True):
    """What POST /v1/responses answers, and what the first and last events of a stream carry."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    output: list[dict[str, Any]]
    instructions: str | None
    tools: list[ResponseTool]
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | AllowedResponseTools
    parallel_tool_calls: bool
    text: ResponseText
    reasoning: ResponseReasoning
    max_output_tokens: int | None
    temperature: float
    top_p: float
    metadata: dict[str, str]
    user: str | None
    usage: ResponseUsage | None = None
    incomplete_details: IncompleteDetails | None = None
    object: Literal["response"] = "response"
    error: None = None
    previous_response_id: None = None
    background: Literal[False] = False
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"


class MessagesUsage(msgspec.Struct):
    """input_tokens: of the prompt, but for those read from the cache."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: Literal[0] = 0


class MessagesReply(msgspec.Struct, kw_only=True):
    """What POST /v1/messages answers: text, thinking and tool_use blocks."""

    id: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessagesUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class CountTokensReply(msgspec.Struct):
    input_tokens: int


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


class AbortReply(msgspec.Struct):
    """num_aborted: generations that ran under this id; their clients get what there is, with finish_reason "abort"."""

    request_id: str
    num_aborted: int


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    error: ErrorDetail
