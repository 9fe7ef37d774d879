"""Launch parameters of the Triton kernels, measured: how much faster the best is than the shipped, and the table to ship."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_sections import shared_prefix
from gpu_sections.attention import Case, Problem, toka_attention
from gpu_sections.measure import Deadline, device_ms
from gpu_sections.sampling import toka_sampler
from toka.kernels.triton.tuning import TABLE, LaunchParameters, TuningTable

Run = Callable[[], Any]


def measure(device: torch.device, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """Yields for each kernel and shape class the milliseconds by launch parameters, and then the table."""
    if device.type == "cpu":
        yield "note", "Triton kernels run on CUDA only: nothing to tune"
        return
    for run in _runs(device):
        yield from tune(TABLE, run, functools.partial(device_ms, run, device), deadline)
    yield "table", TABLE.to_json()


def tune(
    table: TuningTable, run: Run, milliseconds: Callable[[], float], deadline: Deadline
) -> Iterator[tuple[str, Any]]:
    """Tune what `run` looks up and nothing tuned before, one place after the other while there is time."""
    run()
    for kernel, capability, key in table.seen():
        if deadline.is_over:
            return
        times: dict[str, float] = {}

        def measured(parameters: LaunchParameters, times: dict[str, float] = times) -> float:
            try:
                ms = milliseconds()
            except Exception as error:  # too many registers or too much shared memory, as Triton's compiler finds out
                if "out of resource" not in str(error):
                    raise
                ms = float("inf")
            times[_name_of(parameters)] = ms
            return ms

        best = table.tune(kernel, capability, key, measured)
        shipped = _name_of(table.candidates(kernel, capability, key)[0])
        finite = {name: ms for name, ms in times.items() if ms < float("inf")}
        yield (
            f"{kernel}_{'_'.join(map(str, key))}",
            {"best": _name_of(best), "shipped": shipped, "ms": finite},
        )


def _runs(device: torch.device) -> Iterator[Run]:
    """One of each kernel and head dim, of sizes that a busy engine has."""
    for head_dim in (128, 64):
        for rows, queries, length in ((64, 1, 1024), (1, 2048, 2048)):
            case = Case(rows, queries, length, num_heads=32, num_kv_heads=8, head_dim=head_dim)
            yield toka_attention(Problem(case, device, torch.bfloat16), device)
        sharing = shared_prefix.Case(256, 2048, 128, num_heads=32, num_kv_heads=8, head_dim=head_dim)
        problem = shared_prefix.Problem(sharing, device, torch.bfloat16)
        yield shared_prefix.toka_attention(problem, *problem.one_group)
    yield toka_sampler(torch.randn(64, 128256, device=device, dtype=torch.bfloat16), greedy=False)


def _name_of(parameters: LaunchParameters) -> str:
    constants = " ".join(f"{name}={value}" for name, value in parameters.constants)
    return f"{constants} warps={parameters.num_warps} stages={parameters.num_stages}"
