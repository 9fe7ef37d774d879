"""From a configuration to an engine that is warm (floor 7)."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import torch

from toka.config import Config, DeviceFacts, num_available_cores, resolve
from toka.engine.core import EngineCore
from toka.engine.executor import LocalExecutor
from toka.errors import ConfigError
from toka.messages import Ready
from toka.model_source import ModelSource, read_hf_config
from toka.models.spec import read_spec
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.scheduler import Scheduler
from toka.warmup import memory
from toka.warmup.run import warm_up
from toka.weights.loader import open_checkpoint


def build_engine(config: Config, source: ModelSource, *, quiet: bool = False) -> tuple[EngineCore, Ready]:
    """Load, compile and warm the model; returns the engine and what it has to say when ready.

    quiet: no progress on stderr. Raises ConfigError if checkpoint, flags, compiler or memory do not allow it.
    """
    hf_config = read_hf_config(source)
    spec = read_spec(hf_config, config.rope_scaling)
    resolved = resolve(
        config, {**hf_config, "max_position_embeddings": spec.max_context_tokens}, device_facts(config.device)
    )
    limits = SchedulerConfig(
        num_blocks=-(-resolved.max_context_tokens // resolved.block_size),  # one full request, until the warmup knows
        max_request_tokens=resolved.max_context_tokens,
        block_size=resolved.block_size,
        max_tokens_per_forward=resolved.max_tokens_per_forward,
        max_seqs_per_forward=resolved.max_seqs_per_forward,
        prefix_cache=resolved.prefix_cache,
        steps_in_flight=resolved.steps_in_flight,
        vocab_size=spec.vocab_size,
    )
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")
    warm = thread.submit(warm_up, spec, open_checkpoint(source.path), resolved, limits, quiet=quiet).result()
    scheduler_config = dataclasses.replace(limits, num_blocks=warm.num_kv_blocks)
    engine = EngineCore(Scheduler(scheduler_config), LocalExecutor(warm.runner, thread), warm.runner.compiled)
    ready = Ready(
        vocab_size=spec.vocab_size,
        max_context_tokens=resolved.max_context_tokens,
        max_request_tokens=scheduler_config.max_tokens_per_request,
        num_kv_blocks=warm.num_kv_blocks,
        block_size=resolved.block_size,
        dtype=resolved.dtype,
        device=resolved.device,
        longest_step_s=warm.report.longest_step_s,
        startup_s=warm.report.phases_s,
        report=warm.report.to_dict(),
    )
    return engine, ready


def device_facts(wanted: str) -> DeviceFacts:
    """What this machine has; wanted is the flag `device`. ConfigError if it is not there."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("device=cuda: PyTorch sees no CUDA device here; set device=cpu")
    return DeviceFacts(
        kind="cuda" if wanted == "cuda" else "cpu",
        native_bfloat16=torch.cpu._is_avx512_bf16_supported(),
        total_memory_bytes=memory.total_memory_bytes(),
        num_cores=num_available_cores(),
    )
