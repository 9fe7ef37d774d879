"""The warmup: code → weights → measure → KV cache → every bucket → freeze (floor 6)."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from rich.console import Console

from toka.compile.compiled_model import CompiledModel
from toka.models.decoder import CausalLM
from toka.models.encoder import Encoder
from toka.plan import SHARED_PREFIX_STEP, BatchPlan
from toka.runner.kv_cache import KVCache, KVCacheShape
from toka.runner.model_runner import ModelRunner
from toka.runner.step_buffers import Bucket
from toka.runner.step_program import kv_cache_shape, step_parameters
from toka.warmup import code, coverage, memory
from toka.warmup.progress import WarmupProgress
from toka.warmup.report import BucketReport, WarmupReport
from toka.warmup.setup import EngineSetup
from toka.weights.loader import load_weights
from toka.weights.weight import CheckpointReader


@dataclass(frozen=True)
class WarmEngineParts:
    """What the warmup hands to the engine: a frozen runner with its KV cache, and the report."""

    runner: ModelRunner
    num_kv_blocks: int
    report: WarmupReport


def warm_up(setup: EngineSetup, reader: CheckpointReader, *, quiet: bool = False) -> WarmEngineParts:
    """Bring a model from its checkpoint to the point where no request can meet anything for the first time.

    To be called by the thread that will run the steps.
    Raises ConfigError if the checkpoint, the compiler, the artifact or the memory does not allow it.
    """
    torch.set_num_threads(setup.config.num_threads)
    report = WarmupReport()
    with WarmupProgress(report, quiet=quiet) as progress, torch.no_grad():
        model = setup.build_model()
        shape = kv_cache_shape(model, setup.dtype, setup.config.block_size)
        compiled = code.obtain(model, setup, progress, report)
        _bind_weights(compiled, model, reader, setup.device, progress)
        runner = ModelRunner(compiled, setup.runner_sizes, setup.device)
        step, report.longest_step_s = _measure(runner, shape, setup, progress)
        with progress.phase("KV cache"):
            graph_pools = memory.graph_pool_bytes(setup.runner_sizes.num_captured, len(compiled.graph.calls))
            available = memory.room_for_kv_cache(memory.available_memory_bytes(setup.device), step, graph_pools)
            num_blocks = memory.num_kv_blocks(setup.config, shape, available)
            cache = KVCache(shape, num_blocks, setup.device)
            runner.attach(cache)
        _run_buckets(runner, num_blocks, setup, progress, report)
        compiled.freeze()
    report.memory = memory.MemoryTable(
        weights=memory.tensor_bytes(compiled.parameters),
        tables=runner.table_bytes,
        activations=step.activation_bytes,
        graph_pools=graph_pools,
        workspace=step.workspace_bytes,
        kv_cache=cache.num_bytes,
        headroom=available - cache.num_bytes,
    )
    report.num_kv_blocks, report.kv_tokens = num_blocks, num_blocks * setup.config.block_size
    if not quiet:
        Console(stderr=True).print(report.to_text(), highlight=False)
    return WarmEngineParts(runner, num_blocks, report)


def _bind_weights(
    compiled: CompiledModel,
    model: CausalLM | Encoder,
    reader: CheckpointReader,
    device: torch.device,
    progress: WarmupProgress,
) -> None:
    """Load the checkpoint into the model and hand its tensors over to the compiled code, in the layouts that this wants."""
    with progress.phase("weights"):
        load_weights(
            model,
            reader,
            device,
            lambda done, total: progress.detail(f"{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"),
        )
    with progress.phase("bind"):
        parameters = step_parameters(model)
        model.to("meta")  # or it would keep the tensors that binding joins and packs
        compiled.bind(parameters)


def _measure(
    runner: ModelRunner, shape: KVCacheShape, setup: EngineSetup, progress: WarmupProgress
) -> tuple[memory.StepMemory, float]:
    """Run the largest step whole on a small cache; returns what it needed beside weights and cache, and the seconds it took.

    Before it, where rows may share a prefix, each region once with as many such rows as there can be: kernels then need room that no
    other step asks for.
    """
    bucket, block_size = next(coverage.buckets(runner)), setup.config.block_size
    num_blocks = bucket.num_rows + -(-bucket.num_tokens // block_size) + SHARED_PREFIX_STEP
    max_rows, max_tokens = runner.sizes.max_rows, runner.sizes.max_blocks_per_row * block_size
    generates = setup.pooling is None
    plan = coverage.dummy_plan(bucket, num_blocks, block_size, sampled=True, scored=generates, late=generates)
    masks = coverage.dummy_masks(runner.sizes.vocab_size)

    def run() -> None:
        if runner.sizes.max_shared_groups and max_tokens > 2 * SHARED_PREFIX_STEP:
            shared = coverage.shared_prefix_plan(max_rows, num_blocks, block_size)
            runner.warm(shared, runner.bucket_for(max_rows, max_rows))
        runner.run(plan, lambda: masks)

    cache = KVCache(shape, num_blocks, setup.device)
    for tensor in (*cache.keys, *cache.values):
        tensor.zero_()  # pages first written during the step would be taken for its workspace
    runner.attach(cache)
    with progress.phase("measure"):
        began = time.perf_counter()
        step = memory.measure_step(run, setup.device)
    return step, time.perf_counter() - began


def _run_buckets(
    runner: ModelRunner, num_blocks: int, setup: EngineSetup, progress: WarmupProgress, report: WarmupReport
) -> None:
    buckets = list(coverage.buckets(runner))
    with progress.phase("buckets", num_parts=len(buckets)):
        for index, bucket in enumerate(buckets):
            progress.detail(f"{bucket.num_tokens} tokens")
            plan = coverage.dummy_plan(
                bucket,
                num_blocks,
                setup.config.block_size,
                sampled=index % 2 == 0,
                scored=setup.pooling is None,
                late=setup.pooling is None,
            )
            report.buckets.append(_ready_bucket(runner, plan, bucket, setup.device))
            progress.advance()


def _ready_bucket(runner: ModelRunner, plan: BatchPlan, bucket: Bucket, device: torch.device) -> BucketReport:
    """Run or capture a bucket, so that nothing in it happens for the first time later."""
    masks = coverage.dummy_masks(runner.sizes.vocab_size)
    if bucket.num_tokens > runner.sizes.max_captured_tokens:
        began = time.perf_counter()
        runner.warm(plan, bucket, masks)
        memory.synchronize(device)
        return BucketReport(bucket.num_tokens, bucket.num_samples, (time.perf_counter() - began) * 1e6)
    before = memory.device_memory_in_use(device)
    runner.capture(plan, bucket)
    captured = memory.device_memory_in_use(device) - before
    runner.run(plan, lambda: masks)  # with what follows, which is no part of what is captured
    runner.run(dataclasses.replace(plan, adjusting=None), lambda: masks)
    plan = dataclasses.replace(plan, scoring=None, masked=None, adjusting=None)
    began = time.perf_counter()
    runner.run(plan)
    run_us = (time.perf_counter() - began) * 1e6
    return BucketReport(bucket.num_tokens, bucket.num_samples, run_us, captured / 2**20)
