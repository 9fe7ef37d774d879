"""`toka plan`: the memory table of an engine that is not started, on a device that need not be here (floor 6).

The model is built without storage from its configuration, its step is traced and goes through the passes as for a start, and the sizes
follow from the graphs' shapes. Weights, tables and KV cache are exact; activations are foretold (compile/memory_plan.py); workspace and
graph pools are allowances, since only a run on the device can tell.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table

import toka.kernels.ops  # noqa: F401 (registers the operators that the passes name)
from toka.compile import builder, memory_plan
from toka.compile.memory_plan import StepActivations
from toka.compile.region_graph import RegionGraph
from toka.compile.step_graph import StepGraph
from toka.config import DeviceFacts, hub_offline, num_available_cores
from toka.devices import KNOWN_DEVICES, KnownDevice, PlanFlags
from toka.errors import ConfigError
from toka.model_source import locate_configuration
from toka.plan import MAX_SHARED_LEVELS
from toka.runner.model_runner import RunnerSizes
from toka.runner.pooling_program import graph_of
from toka.runner.step_program import kv_cache_shape
from toka.warmup import memory
from toka.warmup.code import families_of, kernel_chooser
from toka.warmup.memory import MemoryTable, StepMemory
from toka.warmup.setup import EngineSetup, settle

CPU_WORKSPACE_BYTES = 64 * 2**20  # scratch of MKL and of our kernels on a few cores; the warmup measures it
_BLAS_WORKSPACE_BYTES = {
    "sm_90": 64 * 2**20,
    "sm_100": 64 * 2**20,
}  # PyTorch gives cuBLAS and cuBLASLt 32 MiB each there
_OLDER_BLAS_WORKSPACE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory will go.

    activations: of the largest step, by region. kernels: operator → chosen implementation and why. weights_read_ms: the time in which the
    device can read all weights once, about the least that a decode step takes; None where the bandwidth is unknown.
    """

    model: str
    device: str
    dtype: str
    table: MemoryTable
    activations: StepActivations
    num_kv_blocks: int
    block_size: int
    max_context_tokens: int
    kernels: dict[str, str]
    weights_read_ms: float | None

    @property
    def kv_tokens(self) -> int:
        return self.num_kv_blocks * self.block_size

    @property
    def num_full_requests(self) -> int:
        """Requests of full length that the KV cache holds at once."""
        return self.num_kv_blocks // -(-self.max_context_tokens // self.block_size)

    def to_dict(self) -> dict[str, object]:
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "bytes": self.table.rows(),
            "largest_region": self.activations.largest_region,
            "kv_blocks": self.num_kv_blocks,
            "kv_tokens": self.kv_tokens,
            "full_requests": self.num_full_requests,
            "max_context_tokens": self.max_context_tokens,
            "weights_read_ms": self.weights_read_ms,
            "kernels": self.kernels,
        }

    def to_text(self) -> str:
        """The table and what it means, for people."""
        console = Console(file=StringIO(), width=110, record=True, highlight=False)
        console.print(f"{self.model} in {self.dtype} on {self.device}")
        table = Table(box=None)
        for heading in ("what", "MiB", "bytes"):
            table.add_column(heading, justify="left" if heading == "what" else "right")
        for what, num_bytes in self.table.rows().items():
            table.add_row(what.replace("_", " "), f"{num_bytes / 2**20:,.1f}", f"{num_bytes:,}")
        console.print(table)
        if self.table.kv_cache:
            console.print(f"KV cache: {self.kv_tokens:,} tokens in {self.num_kv_blocks:,} blocks")
        if self.num_full_requests:
            console.print(f"holds {self.num_full_requests:,} requests of {self.max_context_tokens:,} tokens at once")
        else:
            console.print(
                f"holds no request of full length: max_num_tokens_per_request becomes {self.kv_tokens + 1:,}, "
                f"the model's context is {self.max_context_tokens:,}"
            )
        console.print(f"activations are highest in region {self.activations.largest_region}")
        if self.weights_read_ms is not None:
            console.print(f"reading all weights once takes at least {self.weights_read_ms:.2f} ms")
        for op, kernel in self.kernels.items():
            console.print(f"{op}: {kernel}")
        return console.export_text()


def run(flags: PlanFlags) -> int:
    """Print the plan; returns the exit status."""
    planned = make_plan(flags)
    print(json.dumps(planned.to_dict()) if flags.json else planned.to_text(), end="\n" if flags.json else "")
    return 0


def make_plan(flags: PlanFlags) -> MemoryPlan:
    """Plan the memory of an engine with these flags.

    Raises ConfigError, naming flag and sizes, if a flag is wrong or the model does not fit.
    """
    flags.check()
    known = KNOWN_DEVICES.get(flags.device)
    source = locate_configuration(flags.model, flags.cache_path(), offline=hub_offline())
    setup = settle(flags, source, None if known is None else _facts(known))
    with torch.no_grad():
        model = setup.build_model()
        graph = graph_of(model, setup.pooling, setup.dtype, setup.config.block_size)
        # Shapes are the same on every device, so the graphs are traced on this one; only the kernels are those of the other.
        choose = kernel_chooser(setup, families_of(setup.device))
        regions, chosen = builder.transform(graph, torch.device("cpu"), choose)
    weights, tables = memory_plan.parameter_bytes(graph, regions), table_bytes(setup.runner_sizes, setup.device)
    activations = largest_step(graph, regions, setup)
    step = StepMemory(activations.peak, _workspace_bytes(setup, known))
    graph_pools = memory.graph_pool_bytes(setup.runner_sizes.num_captured, len(graph.calls))
    left = _memory_bytes(setup, known) - weights - tables
    _check_fit(flags, setup, source.name, left, weights + tables, step.total_bytes + graph_pools)
    shape = kv_cache_shape(model, setup.dtype, setup.config.block_size)
    room = memory.room_for_kv_cache(left, step, graph_pools)
    num_kv_blocks = memory.num_kv_blocks(setup.config, shape, room)
    kv_cache = num_kv_blocks * shape.bytes_per_block
    return MemoryPlan(
        model=source.name,
        device=setup.config.device if known is None else f"{known.name} ({known.architecture})",
        dtype=setup.config.dtype,
        table=MemoryTable(
            weights=weights,
            tables=tables,
            activations=step.activation_bytes,
            graph_pools=graph_pools,
            workspace=step.workspace_bytes,
            kv_cache=kv_cache,
            headroom=room - kv_cache,
        ),
        activations=activations,
        num_kv_blocks=num_kv_blocks,
        block_size=setup.config.block_size,
        max_context_tokens=setup.config.max_context_tokens,
        kernels={each.op: f"{each.overload} ({each.reason})" for each in chosen},
        weights_read_ms=None if known is None else weights / known.bytes_per_s * 1e3,
    )


def largest_step(graph: StepGraph, regions: list[RegionGraph], setup: EngineSetup) -> StepActivations:
    """What the largest bucket's tensors take; regions: after all passes."""
    sizes = step_sizes(setup.runner_sizes)
    modules = {region.name: region.module for region in regions}
    return memory_plan.step_activations(graph, modules, sizes, setup.device.type)


def step_sizes(sizes: RunnerSizes) -> dict[str, int]:
    """Numbers for the symbolic sizes of runner/step_program.py in the largest bucket. B, the KV blocks, and L, their slots, shape no
    value of the step."""
    rows = min(sizes.max_tokens, sizes.max_rows)
    return {
        "T": sizes.max_tokens,
        "R": rows,
        "Q": rows + 1,
        "S": sizes.max_rows,
        "P": sizes.max_rows + 1,
        "M": sizes.max_table_rows,
        "W": sizes.max_blocks_per_row,
        "K": rows,
        "B": 1,
        "L": 1,
        "G": sizes.max_shared_groups + 1,
        "N": MAX_SHARED_LEVELS * sizes.max_rows,
        "X": sizes.max_rows,
    }


def table_bytes(sizes: RunnerSizes, device: torch.device) -> int:
    """Size of the step's inputs and per-request tables on the device, as `ModelRunner.table_bytes`; nothing is allocated there."""
    nowhere = torch.device("meta")
    tables = sizes.tables(nowhere)
    masks = 0 if device.type == "cpu" else sizes.masks(nowhere).num_bytes
    kept = memory.tensor_bytes((*tables.values().values(), *sizes.sums(nowhere).values()))
    return sizes.buffers(tables, nowhere).num_bytes + kept + sizes.adjustments(nowhere).num_bytes + masks


def _facts(device: KnownDevice) -> DeviceFacts:
    return DeviceFacts(
        kind=device.kind,
        native_bfloat16=True,
        total_memory_bytes=device.memory_bytes,
        num_cores=num_available_cores(),
        only_planned=True,
    )


def _memory_bytes(setup: EngineSetup, known: KnownDevice | None) -> int:
    """What the engine can take of the device: all of a known one, of this machine's what is free now."""
    if known is not None:
        return known.usable_bytes
    return memory.available_memory_bytes(setup.device)


def _workspace_bytes(setup: EngineSetup, known: KnownDevice | None) -> int:
    if setup.device.type == "cpu":
        return CPU_WORKSPACE_BYTES
    architecture = known.architecture if known else "sm_{}{}".format(*torch.cuda.get_device_capability(setup.device))
    return _BLAS_WORKSPACE_BYTES.get(architecture, _OLDER_BLAS_WORKSPACE_BYTES)


def _check_fit(flags: PlanFlags, setup: EngineSetup, model: str, left: int, resident: int, step: int) -> None:
    if left < 0:
        raise ConfigError(
            f"device={flags.device}: the weights of {model} need {_gib(resident)} in {setup.config.dtype}, "
            f"{_gib(left + resident)} are there; choose a smaller model or dtype, or a larger device"
        )
    if step > left:
        raise ConfigError(
            f"max_tokens_per_forward={setup.config.max_tokens_per_forward}: a step needs {_gib(step)} beside the weights, "
            f"{_gib(left)} are left of device={flags.device}; lower it (or max_seqs_per_forward={setup.config.max_seqs_per_forward})"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
