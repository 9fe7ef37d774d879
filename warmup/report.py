"""What the warmup did, as a table for people and a dict for machines (floor 6)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from io import StringIO

from rich.console import Console
from rich.table import Table

from toka.warmup.memory import MemoryTable


@dataclass(frozen=True)
class RegionReport:
    """compile_s: what compiling it took, when the artifact was made."""

    name: str
    compile_s: float


@dataclass(frozen=True)
class BucketReport:
    """One bucket: run_us, one pass over every region. capture_mib: what its CUDA graph keeps; 0 without one."""

    num_tokens: int
    num_samples: int
    run_us: float
    capture_mib: float = 0.0


@dataclass
class WarmupReport:
    """phases_s: seconds per phase in order. longest_step_s: of the largest step, run whole. kernels: operator → chosen
    implementation and why. artifact: directory of the compiled code; "" if the graph runs eagerly. batch_invariant: whether all
    kernels are.
    """

    phases_s: dict[str, float] = field(default_factory=dict)
    regions: list[RegionReport] = field(default_factory=list)
    buckets: list[BucketReport] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    memory: MemoryTable | None = None
    longest_step_s: float = 0.0
    num_kv_blocks: int = 0
    kv_tokens: int = 0
    artifact: str = ""
    batch_invariant: bool = False

    @property
    def compile_s(self) -> float:
        """Seconds of this start that went into building kernels, tracing and compiling."""
        return sum(self.phases_s.get(phase, 0.0) for phase in ("kernels", "trace", "compile"))

    def to_dict(self) -> dict[str, object]:
        """For machines: everything in the report, with plain types only."""
        return asdict(self)

    def to_text(self) -> str:
        """Phases, buckets, memory and kernels as aligned text."""
        console = Console(file=StringIO(), width=120, record=True)
        phases = _table("warmup", "phase", "seconds")
        for phase, seconds in self.phases_s.items():
            phases.add_row(phase, f"{seconds:.2f}")
        phases.add_row("total", f"{sum(self.phases_s.values()):.2f}")
        console.print(phases)
        if self.regions:
            regions = _table("regions", "region", "compile s (when the artifact was made)")
            for region in self.regions:
                regions.add_row(region.name, f"{region.compile_s:.1f}")
            console.print(regions)
        if self.buckets:
            buckets = _table("buckets", "tokens", "samples", "run µs", "capture MiB")
            for bucket in self.buckets:
                buckets.add_row(
                    str(bucket.num_tokens),
                    str(bucket.num_samples),
                    f"{bucket.run_us:,.0f}",
                    f"{bucket.capture_mib:.1f}",
                )
            console.print(buckets)
        if self.memory is not None:
            memory = _table("memory", "what", "MiB")
            for what, num_bytes in self.memory.rows().items():
                memory.add_row(what.replace("_", " "), f"{num_bytes / 2**20:,.0f}")
            console.print(memory)
        if self.memory is None or self.memory.kv_cache:
            console.print(f"KV cache: {self.kv_tokens:,} tokens in {self.num_kv_blocks:,} blocks")
        for op, kernel in self.kernels.items():
            console.print(f"{op}: {kernel}", highlight=False)
        console.print(f"batch-invariant: {'yes' if self.batch_invariant else 'no'}")
        return console.export_text()


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table
