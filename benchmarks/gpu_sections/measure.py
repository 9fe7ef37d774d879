"""How long things take, on the device and on the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], object]


class Deadline:
    """A moment until which something may take its time."""

    def __init__(self, budget_s: float):
        self._end = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left_s <= 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_ms(run: Run, device: torch.device) -> float:
    """Median milliseconds that the device needs for what `run` launches, with nothing in its cache beforehand.

    On CUDA the launches are captured and replayed, as in the engine, so that the host's part does not count. `run` must always use the
    same tensors.
    """
    if device.type == "cpu":
        return statistics.median(wall_ms(run, device, 3))
    from triton.testing import do_bench

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles, tunes and allocates what a capture must not
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return float(do_bench(graph.replay, warmup=5, rep=40, return_mode="median"))


def wall_ms(run: Run, device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of the repeats, from the call until the device is idle; one run before them does not count."""
    run()
    synchronize(device)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - began) * 1e3)
    return times


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    num_bytes = 2**30 if device.type == "cuda" else 2**25
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / device_ms(lambda: target.copy_(source), device) / 1e6


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """A square product of random numbers (of which a GPU does fewer per second than of zeros)."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / device_ms(lambda: left @ right, device) / 1e9


def rounded(value: Any) -> Any:
    """The same with four significant digits in every float, so that a page of results fits on a page."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return value
