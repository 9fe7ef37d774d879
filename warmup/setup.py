"""Everything that is settled before a weight is read or a graph is traced (floor 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toka.config import Config, DeviceFacts, ResolvedConfig, num_available_cores, resolve
from toka.errors import ConfigError
from toka.model_source import ModelSource, read_hf_config
from toka.models.decoder import CausalLM
from toka.models.registry import build_model
from toka.models.spec import ModelSpec, read_spec
from toka.runner.model_runner import RunnerSizes
from toka.scheduler.config import SchedulerConfig
from toka.warmup import memory
from toka.weights.formats import FormatPlan, QuantizeFlags, plan_formats


@dataclass(frozen=True)
class EngineSetup:
    """spec: the model's shape. config: no choice left open. limits: what the scheduler's plans keep to; its num_blocks is one
    request of full length until the warmup has sized the KV cache. formats: how each weight is stored.
    """

    spec: ModelSpec
    config: ResolvedConfig
    limits: SchedulerConfig
    formats: FormatPlan

    def build_model(self) -> CausalLM:
        """The model on the meta device, each weight in its format."""
        model = build_model(self.spec, self.dtype)
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
        )


def settle(config: Config, source: ModelSource, device: DeviceFacts | None = None) -> EngineSetup:
    """Read the checkpoint's configuration and settle every flag. device: None = this machine's.

    Raises ConfigError if checkpoint, flags and device do not fit together.
    """
    hf_config = read_hf_config(source)
    spec = read_spec(hf_config, config.rope_scaling)
    facts = device or device_facts(config.device)
    resolved = resolve(config, {**hf_config, "max_position_embeddings": spec.max_context_tokens}, facts)
    limits = SchedulerConfig(
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
        vocab_size=spec.vocab_size,
    )
    quantize = QuantizeFlags(
        resolved.quantize,
        resolved.quantize_exclude,
        resolved.quantize_lm_head,
        resolved.int8_activations,
        has_kernels=resolved.device == "cpu",
    )
    return EngineSetup(spec, resolved, limits, plan_formats(source.path, hf_config, quantize))


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
