"""What a step takes, and how many KV blocks fit in the memory that is left once everything else is there (floor 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.autograd import (  # type: ignore[attr-defined]
    ProfilerConfig,
    ProfilerState,
    _disable_profiler_legacy,
    _enable_profiler_legacy,
)

from toka.config import ResolvedConfig
from toka.errors import ConfigError
from toka.runner.kv_cache import KVCacheShape

_GRAPH_BYTES_PER_CALL = 128 * 2**10  # a region has about 16 kernels


@dataclass(frozen=True)
class MemoryTable:
    """Where the memory goes, in bytes; the same table for what the warmup measured and for what `toka plan` foretells.

    weights: the model's tensors as the step uses them. tables: inputs and per-request tables that stay on the device. activations: tensors
    that the largest step allocates, at their highest. graph_pools: what captured graphs keep for themselves. workspace: what kernels
    and libraries take beside tensors. headroom: what is left to the rest of the machine.
    """

    weights: int
    activations: int
    kv_cache: int
    headroom: int
    graph_pools: int = 0
    workspace: int = 0
    tables: int = 0

    def rows(self) -> dict[str, int]:
        """Name → bytes, in the order in which it is taken."""
        names = ("weights", "tables", "activations", "graph_pools", "workspace", "kv_cache", "headroom")
        return {name: int(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class StepMemory:
    """What one step takes while it runs, in bytes. activation: PyTorch's tensors at their highest. workspace: anything else."""

    activation_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.activation_bytes + self.workspace_bytes


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Size of these tensors, on whatever device (meta too); a tensor that is listed twice counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(each): each for each in tensors}.values())


def room_for_kv_cache(available_bytes: int, step: StepMemory, graph_pools: int = 0) -> int:
    """Bytes that the KV cache and the headroom can have, of those available once weights and tables are there."""
    return max(available_bytes - step.total_bytes - graph_pools, 0)


def graph_pool_bytes(num_buckets: int, num_calls: int) -> int:
    """What captured graphs keep beside their tensors, which share one pool that is as large as the largest step's activations.

    num_calls: regions called in a step. An allowance: the driver keeps a few KiB for each of a graph's kernels.
    """
    return num_buckets * num_calls * _GRAPH_BYTES_PER_CALL


def num_kv_blocks(config: ResolvedConfig, shape: KVCacheShape, available_bytes: int) -> int:
    """Blocks of the KV cache: what the flag says, else the share of `available_bytes` that the configuration allows.

    Never more than all requests of a full step could fill at once. ConfigError if not even two blocks fit. Without a KV cache blocks
    stand for no memory: there are as many as requests can hold, those that drain included.
    """
    blocks_per_request = -(-config.max_context_tokens // config.block_size)
    if not shape.bytes_per_block:
        return 2 * config.max_seqs_per_forward * blocks_per_request
    if config.kv_cache_num_tokens is not None:
        num_blocks = config.kv_cache_num_tokens // config.block_size
        if num_blocks < 2:
            raise ConfigError(
                f"kv_cache_num_tokens={config.kv_cache_num_tokens}: must hold two blocks of {config.block_size} tokens"
            )
        if num_blocks * shape.bytes_per_block > available_bytes:
            needed, left = num_blocks * shape.bytes_per_block / 2**30, available_bytes / 2**30
            raise ConfigError(
                f"kv_cache_num_tokens={config.kv_cache_num_tokens} needs {needed:.1f} GiB; {left:.1f} GiB are left"
            )
        return num_blocks
    fitting = int(available_bytes * config.kv_cache_memory_fraction) // shape.bytes_per_block
    if fitting < 2:
        raise ConfigError(
            f"no memory is left for the KV cache ({available_bytes / 2**20:.0f} MiB available): use a smaller model or dtype"
        )
    return min(fitting, config.max_seqs_per_forward * blocks_per_request)


def available_memory_bytes(device: torch.device) -> int:
    """What this process can still take of the device's memory. RAM: what the system calls available, within the container's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used + _cgroup_page_cache())
    return max(available, 0)


def device_memory_in_use(device: torch.device) -> int:
    """Bytes of the GPU's memory that anybody has taken; 0 on the CPU, where nothing is captured."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total_memory_bytes() -> int:
    """RAM of the machine or the container's limit, whichever is less."""
    total = int(psutil.virtual_memory().total)
    limit = _cgroup("memory.max")
    return total if limit is None else min(total, limit)


def _cgroup(name: str) -> int | None:
    """A number from the version 2 control group; None if there is no limit or no such group."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_page_cache() -> int:
    """File pages that the group's limit counts but the system takes back at need."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def measure_step(run: Callable[[], object], device: torch.device) -> StepMemory:
    """Run a step and measure what it takes beyond what this process holds already. The step must run on the calling thread.

    On CPU the tensors' bytes are those that PyTorch's allocator reports, to the byte; the workspace is what resident memory grew by
    beyond them (scratch of MKL and of our kernels, stacks of threads that were started). On CUDA the step runs twice, since libraries keep
    what they take from PyTorch's allocator at their first use; both figures are those of the device.
    """
    if device.type == "cuda":
        return _measure_on_cuda(run, device)
    with PeakMemory() as resident:
        activation_bytes = peak_of_cpu_tensors(run)
    return StepMemory(activation_bytes, max(resident.num_bytes - activation_bytes, 0))


def peak_of_cpu_tensors(run: Callable[[], object]) -> int:
    """Bytes of CPU tensors that `run` allocates on this thread and holds at once, at their highest; compiled code included.

    The figures are the allocator's own reports to PyTorch's profiler, of which nothing else is switched on.
    """
    settings = (ProfilerState.CPU, False, True, False, False, False)  # of these only profile_memory is wanted
    _enable_profiler_legacy(ProfilerConfig(*settings, torch._C._profiler._ExperimentalConfig()))
    try:
        run()
    finally:
        events: list[Any] = [event for thread in _disable_profiler_legacy() for event in thread]
    now = peak = 0
    for event in events:
        if event.kind() == "memory_alloc":  # also a release, which is negative
            now += event.cpu_memory_usage()
            peak = max(peak, now)
    return peak


def _measure_on_cuda(run: Callable[[], object], device: torch.device) -> StepMemory:
    torch.cuda.synchronize(device)
    free_before, _ = torch.cuda.mem_get_info(device)
    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    activation_bytes = torch.cuda.max_memory_allocated(device) - before
    free_after, _ = torch.cuda.mem_get_info(device)  # PyTorch keeps what it has freed, so this is the step's peak
    return StepMemory(activation_bytes, max(free_before - free_after - activation_bytes, 0))


class PeakMemory:
    """Resident memory of this process at its highest while inside the `with` block, above what it was before; in bytes."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        _reset_peak()
        self.num_bytes = 0
        return self

    def __exit__(self, *exc: object) -> None:
        self.num_bytes = max(_peak_rss(self._process) - self._before, 0)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    except OSError:
        return  # not Linux, or not allowed: the peak then includes earlier phases, and the figure errs on the safe side


def _peak_rss(process: psutil.Process) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(process.memory_info().rss)
