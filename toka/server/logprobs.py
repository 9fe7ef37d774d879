"""Logprobs as the APIs tell them: OpenAI's two forms, and vLLM's of a whole prompt.

Tokens are spelled as their text. One that is part of a UTF-8 sequence is spelled by its bytes, as OpenAI does: `bytes:\\xe2\\x80`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from toka.messages import TokenLogprob
from toka.server.schemas import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptTokenLogprob,
    TopLogprob,
)
from toka.text.detokenizer import Detokenizer
from toka.text.held_scores import ScoredToken
from toka.text.tokenizer import Tokenizer


def spelling(tokenizer: Tokenizer, token_id: int) -> str:
    """How a reply names a token; special tokens are spelled out."""
    data = tokenizer.spelled_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[ScoredToken], num_top: int, first_offset: int = 0
) -> CompletionLogprobs:
    """Of these tokens. first_offset: characters of the choice's text before that to which the tokens' own offsets refer."""
    return CompletionLogprobs(
        text_offset=[first_offset + token.offset for token in tokens],
        token_logprobs=[None if token.score is None else token.score.logprob for token in tokens],
        tokens=[spelling(tokenizer, token.token_id) for token in tokens],
        top_logprobs=[
            None if token.score is None else _top_by_text(tokenizer, token.score, num_top) for token in tokens
        ],
    )


def _top_by_text(tokenizer: Tokenizer, score: TokenLogprob, num_top: int) -> dict[str, float]:
    """The likeliest tokens and the token itself; of several with the same text the likeliest."""
    found: dict[str, float] = {}
    for token_id, logprob in (*score.top[:num_top], (score.token_id, score.logprob)):
        found.setdefault(spelling(tokenizer, token_id), logprob)
    return found


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ScoredToken], num_top: int) -> ChatLogprobs:
    """Of these generated tokens."""
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                *_named(tokenizer, score.token_id, score.logprob),
                [TopLogprob(*_named(tokenizer, *each)) for each in score.top[:num_top]],
            )
            for score in (token.score for token in tokens)
            if score is not None
        ]
    )


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    return spelling(tokenizer, token_id), logprob, list(tokenizer.spelled_bytes(token_id))


def prompt_logprobs(
    tokenizer: Tokenizer, scores: Sequence[TokenLogprob], num_top: int
) -> list[dict[str, PromptTokenLogprob] | None]:
    """vLLM's form: by token id, for each token of a prompt; null for the first."""

    def ranked(score: TokenLogprob) -> Iterator[tuple[int, float, int]]:
        for rank, (token_id, logprob) in enumerate(score.top[:num_top], 1):
            yield token_id, logprob, rank
        yield score.token_id, score.logprob, score.rank

    return [
        None,
        *(
            {
                str(token_id): PromptTokenLogprob(logprob, rank, spelling(tokenizer, token_id))
                for token_id, logprob, rank in ranked(score)
            }
            for score in scores
        ),
    ]


def scored_prompt(
    tokenizer: Tokenizer, token_ids: Sequence[int], text: str, scores: Sequence[TokenLogprob]
) -> list[ScoredToken]:
    """A prompt's tokens with their places in its text. scores: of all but the first."""
    detokenizer, offsets, offset = Detokenizer(tokenizer.token_bytes), [], 0
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(detokenizer.push(token_id))
    surplus = offset + len(detokenizer.flush()) - len(text)  # 1 where the tokenizer puts a space before every text
    shift = 1 if surplus == 1 else 0
    return [
        ScoredToken(token_id, max(offset - shift, 0), score)
        for token_id, offset, score in zip(token_ids, offsets, (None, *scores), strict=True)
    ]
