"""The warmup: weights → kernels → compile → measure → KV cache → every bucket → freeze (floor 6)."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from rich.console import Console

from toka.compile.compiled_model import CompiledModel, CompileOptions
from toka.compile.passes.select_kernels import ChosenKernel
from toka.config import ResolvedConfig
from toka.errors import ConfigError
from toka.kernels import registry
from toka.kernels.cpp import build as cpp_build
from toka.models.decoder import CausalLM
from toka.models.registry import build_model
from toka.models.spec import ModelSpec
from toka.runner.kv_cache import KVCache, KVCacheShape
from toka.runner.model_runner import ModelRunner, RunnerSizes
from toka.runner.step_program import build_step_graph, kv_cache_shape, step_parameters
from toka.scheduler.config import SchedulerConfig
from toka.warmup import coverage, memory
from toka.warmup.progress import WarmupProgress
from toka.warmup.report import WarmupReport
from toka.weights.loader import load_weights
from toka.weights.weight import CheckpointReader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmEngineParts:
    """What the warmup hands to the engine: a frozen runner with its KV cache, and the report."""

    runner: ModelRunner
    num_kv_blocks: int
    report: WarmupReport


def warm_up(
    spec: ModelSpec, reader: CheckpointReader, config: ResolvedConfig, limits: SchedulerConfig, *, quiet: bool = False
) -> WarmEngineParts:
    """Bring a model from its checkpoint to the point where no request can meet anything for the first time.

    limits: what the scheduler's plans will keep to; its num_blocks must be enough for one request of full length. To be called by the
    thread that will run the steps.
    Raises ConfigError if the checkpoint, the compiler or the memory does not allow it.
    """
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    torch.set_num_threads(config.num_threads)
    report = WarmupReport()
    with WarmupProgress(report, quiet=quiet) as progress, torch.no_grad():
        model = _load(spec, reader, dtype, device, progress)
        compiled = _compile(model, dtype, config, device, progress, report)
        shape = kv_cache_shape(model, dtype, config.block_size)
        runner = ModelRunner(compiled, _runner_sizes(limits), device)
        activations, report.longest_step_s = _measure(runner, shape, config, device, progress)
        with progress.phase("KV cache"):
            available = memory.available_memory_bytes()
            num_blocks = memory.num_kv_blocks(config, shape, available)
            cache = KVCache(shape, num_blocks, device)
            runner.attach(cache)
        _run_buckets(runner, num_blocks, config, progress, report)
        compiled.freeze()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in step_parameters(model).values())
    report.memory = memory.MemoryTable(weights, activations, cache.num_bytes, available - cache.num_bytes)
    report.num_kv_blocks, report.kv_tokens = num_blocks, num_blocks * config.block_size
    report.kernels = {chosen.op: f"{chosen.overload} ({chosen.reason})" for chosen in compiled.chosen_kernels}
    if not quiet:
        Console(stderr=True).print(report.to_text(), highlight=False)
    return WarmEngineParts(runner, num_blocks, report)


def _runner_sizes(limits: SchedulerConfig) -> RunnerSizes:
    return RunnerSizes(
        max_tokens=limits.max_tokens_per_forward,
        max_rows=limits.max_running,
        max_table_rows=limits.max_rows,
        max_blocks_per_row=limits.max_blocks_per_row,
    )


def _load(
    spec: ModelSpec, reader: CheckpointReader, dtype: torch.dtype, device: torch.device, progress: WarmupProgress
) -> CausalLM:
    with progress.phase("weights"):
        model = build_model(spec, dtype)
        load_weights(
            model,
            reader,
            device,
            lambda done, total: progress.detail(f"{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"),
        )
    return model


def _compile(
    model: CausalLM,
    dtype: torch.dtype,
    config: ResolvedConfig,
    device: torch.device,
    progress: WarmupProgress,
    report: WarmupReport,
) -> CompiledModel:
    kernels_fingerprint, families = "reference", {"reference"}
    try:
        with progress.phase("kernels"):
            library = cpp_build.build(config.cache_path, config.cxx, progress.detail)
            cpp_build.load(library)
            kernels_fingerprint = library.parent.name
            families.add("cpp")
    except ConfigError as error:
        if config.torch_compile:
            raise
        log.warning("torch_compile=F runs on the plain-torch reference kernels, many times slower, since %s", error)
    graph = build_step_graph(model, dtype, config.block_size)
    options = CompileOptions(
        device=device,
        compile=config.torch_compile,
        cache_path=config.cache_path,
        choose_kernel=lambda op, tensor: _choose(op, tensor, device, families),
        kernels_fingerprint=kernels_fingerprint,
    )
    compiled = CompiledModel(graph, options)
    with progress.phase("compile", num_parts=len(graph.regions)):
        for built in compiled.build(progress.detail):
            report.regions.append((built.name, built.seconds, built.cached))
            progress.advance()
    compiled.bind(step_parameters(model))
    return compiled


def _choose(op: str, first_tensor: torch.Tensor, device: torch.device, families: set[str]) -> ChosenKernel:
    head_dim = None if op == "sample" else int(first_tensor.shape[-1])
    kernel = registry.choose(op, device.type, first_tensor.dtype, families=families, head_dim=head_dim)
    return ChosenKernel(op, kernel.overload, kernel.reason)


def _measure(
    runner: ModelRunner, shape: KVCacheShape, config: ResolvedConfig, device: torch.device, progress: WarmupProgress
) -> tuple[int, float]:
    """Run the largest step whole on a small cache; returns the bytes it needed beside weights and cache, and its seconds."""
    bucket = next(coverage.buckets(runner))
    num_blocks = bucket.num_rows + -(-bucket.num_tokens // config.block_size)
    runner.attach(KVCache(shape, num_blocks, device))
    with progress.phase("measure"):
        plan = coverage.dummy_plan(bucket, num_blocks, config.block_size, sampled=True)
        began = time.perf_counter()
        with memory.PeakMemory() as peak:
            runner.run(plan)
    return peak.num_bytes, time.perf_counter() - began


def _run_buckets(
    runner: ModelRunner, num_blocks: int, config: ResolvedConfig, progress: WarmupProgress, report: WarmupReport
) -> None:
    buckets = list(coverage.buckets(runner))
    with progress.phase("buckets", num_parts=len(buckets)):
        for index, bucket in enumerate(buckets):
            progress.detail(f"{bucket.num_tokens} tokens")
            plan = coverage.dummy_plan(bucket, num_blocks, config.block_size, sampled=index % 2 == 0)
            began = time.perf_counter()
            runner.warm(plan, bucket)
            report.buckets_us[bucket.num_tokens] = (time.perf_counter() - began) * 1e6
            progress.advance()
