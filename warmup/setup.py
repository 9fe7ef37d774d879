"""Everything that is settled before a weight is read or a graph is traced (floor 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from toka.config import Config, DeviceFacts, ResolvedConfig, num_available_cores, resolve
from toka.errors import ConfigError
from toka.model_source import ModelSource, read_hf_config
from toka.models.decoder import CausalLM
from toka.models.encoder import Encoder
from toka.models.encoder_spec import EncoderSpec, read_encoder_spec
from toka.models.registry import build_encoder, build_model
from toka.models.spec import ModelSpec, read_spec
from toka.pooling import Pooling, read_pooling
from toka.runner.model_runner import RunnerSizes
from toka.scheduler.config import SchedulerConfig
from toka.warmup import memory
from toka.weights.formats import FormatPlan, QuantizeFlags, plan_formats

_CACHE_LINE_TOKENS = 16  # the scheduler's tables have rows of whole cache lines


@dataclass(frozen=True)
class EngineSetup:
    """spec: the model's shape. config: no choice left open. limits: what the scheduler's plans keep to; its num_blocks is one
    request of full length until the warmup has sized the KV cache. formats: how each weight is stored. pooling: what is done with prompts;
    None: text is generated.
    """

    spec: ModelSpec | EncoderSpec
    config: ResolvedConfig
    limits: SchedulerConfig
    formats: FormatPlan
    pooling: Pooling | None = None

    def build_model(self) -> CausalLM | Encoder:
        """The model on the meta device, each weight in its format."""
        model: CausalLM | Encoder
        if isinstance(self.spec, EncoderSpec):
            model = build_encoder(self.spec, self.dtype)
        else:
            model = build_model(self.spec, self.dtype, with_head=self.pooling is None)
        self.formats.apply(model)
        return model

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype

    @property
    def runner_sizes(self) -> RunnerSizes:
        return RunnerSizes(
            max_tokens=self.limits.max_tokens_per_forward,
            max_rows=self.limits.max_running,
            max_table_rows=self.limits.max_rows,
            max_blocks_per_row=self.limits.max_blocks_per_row,
            max_captured_tokens=self.config.max_captured_tokens,
            token_step=self.config.token_step,
            max_in_flight=self.config.steps_in_flight,
            max_shared_groups=self.limits.max_shared_groups,
            vocab_size=self.spec.vocab_size,
            block_size=self.config.block_size,
            vector_width=0 if self.pooling is None else self.pooling.width,
            sums_width=self.spec.hidden_size if self.pooling is not None and self.pooling.mode == "mean" else 0,
        )


def settle(config: Config, source: ModelSource, device: DeviceFacts | None = None) -> EngineSetup:
    """Read the checkpoint's configuration and settle every flag. device: None = this machine's.

    Raises ConfigError if checkpoint, flags and device do not fit together.
    """
    hf_config = read_hf_config(source)
    pooling = read_pooling(config, hf_config, source.path if source.kind == "hf_dir" else None)
    facts = device or device_facts(config.device)
    if pooling is None:
        spec = read_spec(hf_config, config.rope_scaling)
        resolved = _resolve(config, hf_config, spec.max_context_tokens, facts)
        return EngineSetup(spec, resolved, _limits(resolved, spec.vocab_size), _formats(resolved, hf_config, source))
    return _settle_pooling(config, hf_config, pooling, facts, source)


def _resolve(
    config: Config, hf_config: Mapping[str, Any], max_context_tokens: int, facts: DeviceFacts
) -> ResolvedConfig:
    return resolve(config, {**hf_config, "max_position_embeddings": max_context_tokens}, facts)


def _formats(resolved: ResolvedConfig, hf_config: Mapping[str, Any], source: ModelSource) -> FormatPlan:
    quantize = QuantizeFlags(
        resolved.quantize,
        resolved.quantize_exclude,
        resolved.quantize_lm_head,
        resolved.int8_activations,
        has_kernels=resolved.device == "cpu",
    )
    return plan_formats(source.path, hf_config, quantize)


def _limits(resolved: ResolvedConfig, vocab_size: int) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=-(-resolved.max_context_tokens // resolved.block_size),
        max_request_tokens=resolved.max_context_tokens,
        block_size=resolved.block_size,
        max_tokens_per_forward=resolved.max_tokens_per_forward,
        max_seqs_per_forward=resolved.max_seqs_per_forward,
        prefix_cache=resolved.prefix_cache,
        steps_in_flight=resolved.steps_in_flight,
        track_early_stopping=resolved.track_early_stopping,
        use_hydragen=resolved.use_hydragen,
        hydragen_min_group_size=resolved.hydragen_min_group_size,
        hydragen_min_prefix_len=resolved.hydragen_min_prefix_len,
        vocab_size=vocab_size,
    )


# -------------------------------------------------------------------------------------------------------------- pooling


def _settle_pooling(
    config: Config, hf_config: Mapping[str, Any], pooling: Pooling, facts: DeviceFacts, source: ModelSource
) -> EngineSetup:
    """As `settle`, of an engine whose requests end with their prompts: these may fill the whole context."""
    if pooling.is_encoder:
        return _settle_encoder(config, hf_config, pooling, facts, source)
    spec = read_spec(hf_config, config.rope_scaling)
    resolved = _resolve(config, hf_config, _longest_prompt(config, spec.max_context_tokens, pooling), facts)
    # The mean is over all of a prompt's tokens, cached ones too, of which there are no hidden states.
    resolved = dataclasses.replace(resolved, prefix_cache=resolved.prefix_cache and pooling.mode == "last")
    limits = _pooling_limits(resolved, spec.vocab_size, whole_prompts=False)
    pooling = msgspec.structs.replace(pooling, width=spec.hidden_size)
    return EngineSetup(spec, resolved, limits, _formats(resolved, hf_config, source), pooling)


def _settle_encoder(
    config: Config, hf_config: Mapping[str, Any], pooling: Pooling, facts: DeviceFacts, source: ModelSource
) -> EngineSetup:
    """A prompt is computed in one step and leaves nothing behind: each takes one block, which stands for no memory."""
    for name in ("kv_cache_num_tokens", "kv_cache_memory_fraction", "rope_scaling"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name}: an encoder has {'no rope' if name == 'rope_scaling' else 'no KV cache'}; leave it out"
            )
    if config.quantize not in ("auto", "none"):
        raise ConfigError(f"quantize={config.quantize}: the weights of encoders are kept in dtype; leave it out")
    spec = read_encoder_spec(hf_config, with_classifier=pooling.task == "score")
    if spec.num_labels > 1:
        raise ConfigError(
            f"task=score: the checkpoint's classifier has {spec.num_labels} labels, a score is one number"
        )
    resolved = _resolve(config, hf_config, _longest_prompt(config, spec.max_context_tokens, pooling), facts)
    context = resolved.max_context_tokens
    if config.max_tokens_per_forward is not None and context > config.max_tokens_per_forward:
        raise ConfigError(
            f"max_tokens_per_forward={config.max_tokens_per_forward}: an encoder computes a prompt in one step and its longest has "
            f"{context} tokens; raise it, or set max_num_tokens_per_request"
        )
    resolved = dataclasses.replace(
        resolved,
        max_tokens_per_forward=max(resolved.max_tokens_per_forward, context),
        block_size=-(-context // _CACHE_LINE_TOKENS) * _CACHE_LINE_TOKENS,
        prefix_cache=False,
    )
    limits = _pooling_limits(resolved, spec.vocab_size * spec.num_token_types, whole_prompts=True)
    width = spec.num_labels or spec.hidden_size
    pooling = msgspec.structs.replace(
        pooling, width=width, num_token_types=spec.num_token_types, vocab_size=spec.vocab_size
    )
    return EngineSetup(spec, resolved, limits, _formats(resolved, hf_config, source), pooling)


def _pooling_limits(resolved: ResolvedConfig, vocab_size: int, *, whole_prompts: bool) -> SchedulerConfig:
    """Where nothing is drawn a request never grows: whoever finds blocks for its prompt will end."""
    return dataclasses.replace(
        _limits(resolved, vocab_size),
        max_request_tokens=resolved.max_context_tokens + 1,  # with the token that is never drawn
        admission="when_free",
        watermark=0.0,
        use_hydragen=False,
        pools=True,
        whole_prompts=whole_prompts,
    )


def _longest_prompt(config: Config, max_context_tokens: int, pooling: Pooling) -> int:
    """What the model can hold or, unless a flag says otherwise, what it was made for."""
    if pooling.max_prompt_tokens is None or config.max_num_tokens_per_request is not None:
        return max_context_tokens
    return min(max_context_tokens, pooling.max_prompt_tokens)


def device_facts(wanted: str) -> DeviceFacts:
    """What this machine has; wanted is the flag `device`. ConfigError if it is not there."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("device=cuda: PyTorch sees no CUDA device here; set device=cpu")
    on_cuda = has_cuda and wanted != "cpu"
    return DeviceFacts(
        kind="cuda" if on_cuda else "cpu",
        native_bfloat16=on_cuda or torch.cpu._is_avx512_bf16_supported(),
        total_memory_bytes=torch.cuda.mem_get_info()[1] if on_cuda else memory.total_memory_bytes(),
        num_cores=num_available_cores(),
    )
