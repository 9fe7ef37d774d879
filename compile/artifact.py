"""Where compiled regions are kept, and under which key (floor 4).

The key is a fingerprint over everything that shapes the machine code: the graph after all passes, the passes' versions, torch,
Python, the processor's abilities, the C++ compiler's options, the kernels' sources. Weights are not part of an artifact.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import torch
from torch.export import ExportedProgram

from toka.compile.lower import INDUCTOR_OPTIONS


def fingerprint(program: ExportedProgram, passes: str, kernels: str) -> str:
    """Hex digest of one region's code. passes: names and versions of the passes; kernels: the fingerprint of the kernels' sources."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (_graph_text(program), passes, kernels, repr(sorted(INDUCTOR_OPTIONS.items())), *_environment()):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def region_path(cache_path: Path, region: str, key: str) -> Path:
    return cache_path / "compiled" / f"{region}-{key}.pt2"


def _graph_text(program: ExportedProgram) -> str:
    """The graph with every value's dtype, shape and stride."""
    lines = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        kind = (
            f"{value.dtype}{list(value.shape)}{list(value.stride())}" if isinstance(value, torch.Tensor) else str(value)
        )
        lines.append(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {kind}")
    return "\n".join(lines)


def _environment() -> tuple[str, ...]:
    return (
        torch.__version__,
        sys.version.split()[0],
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        _cpu_flags(),
        f"{torch.get_num_threads()} of {os.cpu_count()} threads",  # inductor writes serial code for one, and sizes scratch by it
    )


def _cpu_flags() -> str:
    """The instruction sets of the first processor (inductor compiles for exactly these), or its name where /proc is missing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name")
    first = text.split("\n\n", 1)[0]
    return "\n".join(line for line in first.splitlines() if line.split("\t")[0].split(":")[0].strip() in wanted)
