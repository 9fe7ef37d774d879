"""How many KV blocks fit in the memory that is left once everything else is there (floor 6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from toka.config import ResolvedConfig
from toka.errors import ConfigError
from toka.runner.kv_cache import KVCacheShape


@dataclass(frozen=True)
class MemoryTable:
    """Where the memory goes, in bytes. activations: measured over the largest step. headroom: what is left to the rest of the machine."""

    weights: int
    activations: int
    kv_cache: int
    headroom: int


def num_kv_blocks(config: ResolvedConfig, shape: KVCacheShape, available_bytes: int) -> int:
    """Blocks of the KV cache: what the flag says, else the share of `available_bytes` that the configuration allows.

    Never more than all requests of a full step could fill at once. ConfigError if not even two blocks fit.
    """
    blocks_per_request = -(-config.max_context_tokens // config.block_size)
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


def available_memory_bytes() -> int:
    """RAM that this process can still take: what the system calls available, within the container's own limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used + _cgroup_page_cache())
    return max(available, 0)


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
