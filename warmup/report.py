"""What the warmup did, as a table for people and a dict for machines (floor 6)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from io import StringIO

from rich.console import Console
from rich.table import Table

from toka.warmup.memory import MemoryTable


@dataclass
class WarmupReport:
    """phases_s: seconds per phase in order. regions: (name, seconds, from the cache). buckets_us: tokens → run time of one pass over every
    region. longest_step_s: of the largest step, run whole. kernels: operator → chosen implementation and why.
    """

    phases_s: dict[str, float] = field(default_factory=dict)
    regions: list[tuple[str, float, bool]] = field(default_factory=list)
    buckets_us: dict[int, float] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    memory: MemoryTable | None = None
    longest_step_s: float = 0.0
    num_kv_blocks: int = 0
    kv_tokens: int = 0

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "buckets_us": {str(size): us for size, us in self.buckets_us.items()}}

    def to_text(self) -> str:
        """Phases, memory and kernels as aligned text."""
        console = Console(file=StringIO(), width=110, record=True)
        table = Table(title="warmup", title_justify="left", box=None)
        for heading in ("phase", "seconds"):
            table.add_column(heading, justify="left" if heading == "phase" else "right")
        for phase, seconds in self.phases_s.items():
            table.add_row(phase, f"{seconds:.2f}")
        table.add_row("total", f"{sum(self.phases_s.values()):.2f}")
        console.print(table)
        if self.memory is not None:
            memory = Table(title="memory", title_justify="left", box=None)
            memory.add_column("what")
            memory.add_column("MiB", justify="right")
            for what, num_bytes in asdict(self.memory).items():
                memory.add_row(what.replace("_", " "), f"{num_bytes / 2**20:,.0f}")
            console.print(memory)
        console.print(f"KV cache: {self.kv_tokens:,} tokens in {self.num_kv_blocks:,} blocks")
        for op, kernel in self.kernels.items():
            console.print(f"{op}: {kernel}", highlight=False)
        return console.export_text()
