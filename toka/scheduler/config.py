"""The scheduler's limits: a frozen value, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from toka.errors import ConfigError
from toka.plan import MAX_SHARED_LEVELS


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes and policies of one scheduler.

    num_blocks: KV blocks that the device holds, ids 0 .. num_blocks - 1, all of them for requests.
    block_size: tokens per block.
    max_request_tokens: prompt + output that one request may reach (the model's context).
    max_tokens_per_forward: tokens of one step at most. max_seqs_per_forward: rows of one step at most.
    prefix_cache: whether requests share the blocks of equal prefixes, running or past.
    steps_in_flight: plans that may wait for their result at once; 2 = one runs while the next is planned.
    vocab_size: token ids from here on are refused.
    watermark: share of the blocks that an admission leaves free while anything else runs, so that growth does not preempt at once.
    admission: who may begin. "forecast": whoever fits over the whole life of all that run; "when_free": whoever finds blocks free
    for its prompt; "reserve_max": whoever fits if everybody ran to max_tokens at once.
    track_early_stopping: the forecast predicts output lengths from those seen; else it takes max_tokens and nobody is preempted.
    retention: which cached block is overwritten first. "worth": the one worth least, see retention.py; "lru": the least recently used.
    early_stopping_margin: standard deviations that a predicted length is longer than the mean.
    use_hydragen: plans say which decode rows share a prefix. hydragen_min_group_size: rows that must share it.
    hydragen_min_prefix_len: tokens that it must have.
    pools: requests end with their prompts, of which the steps give vectors; nothing is drawn. whole_prompts: a prompt is computed in one
    step, since its tokens see those behind them; max_tokens_per_forward holds the longest, and blocks only count.
    """

    num_blocks: int
    max_request_tokens: int
    block_size: int = 16
    max_tokens_per_forward: int = 8192
    max_seqs_per_forward: int = 1024
    prefix_cache: bool = True
    steps_in_flight: int = 2
    vocab_size: int = 2**31 - 1
    watermark: float = 0.01
    admission: Literal["forecast", "when_free", "reserve_max"] = "forecast"
    track_early_stopping: bool = True
    retention: Literal["worth", "lru"] = "worth"
    early_stopping_margin: float = 0.25
    use_hydragen: bool = False
    hydragen_min_group_size: int = 32
    hydragen_min_prefix_len: int = 256
    pools: bool = False
    whole_prompts: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "max_request_tokens",
            "block_size",
            "max_tokens_per_forward",
            "max_seqs_per_forward",
            "steps_in_flight",
            "vocab_size",
            "hydragen_min_group_size",
            "hydragen_min_prefix_len",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.whole_prompts and self.max_tokens_per_request - 1 > self.max_tokens_per_forward:
            raise ConfigError(
                f"max_tokens_per_forward={self.max_tokens_per_forward} must hold a prompt of {self.max_tokens_per_request - 1} tokens"
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark must be at least 0 and below 1, got {self.watermark}")
        if not (math.isfinite(self.early_stopping_margin) and self.early_stopping_margin >= 0.0):
            raise ConfigError(f"early_stopping_margin must be at least 0, got {self.early_stopping_margin}")

    @property
    def max_running(self) -> int:
        """Requests that run at once: each can then have at least one token in every step."""
        return min(self.max_seqs_per_forward, self.max_tokens_per_forward)

    @property
    def max_rows(self) -> int:
        """Rows of the tables on host and device; twice max_running, so that draining rows do not keep new requests out."""
        return 2 * self.max_running

    @property
    def max_shared_groups(self) -> int:
        """Groups of rows that share a prefix in one step; each level has max_running / hydragen_min_group_size at most."""
        return MAX_SHARED_LEVELS * (self.max_running // self.hydragen_min_group_size) if self.use_hydragen else 0

    @property
    def max_tokens_per_request(self) -> int:
        """Prompt + output that one request can hold, the context and the KV cache both considered.

        The last token drawn needs no place in the cache, hence the + 1.
        """
        return min(self.max_request_tokens, self.num_blocks * self.block_size + 1)

    @property
    def max_blocks_per_row(self) -> int:
        """Width of the block tables on host and device (the last token drawn is never written)."""
        return max(1, math.ceil((self.max_tokens_per_request - 1) / self.block_size))

    @property
    def watermark_blocks(self) -> int:
        """`watermark` in whole blocks, rounded up."""
        return math.ceil(self.watermark * self.num_blocks)
