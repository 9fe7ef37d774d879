"""The devices that `toka plan` knows without having them, and its flags (floor 0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toka.config import Config, flag

_GIB = 2**30

# CUDA's context with its loaded kernels, gone before the first tensor: what current drivers take on these devices, rounded up.
CUDA_CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True)
class KnownDevice:
    """memory_bytes: what CUDA reports as the device's memory, ECC's share gone (rounded down). architecture: compute capability.

    bytes_per_s: memory bandwidth, as the maker's data sheet has it.
    """

    name: str
    architecture: str
    memory_bytes: int
    bytes_per_s: float
    kind: Literal["cuda"] = "cuda"

    @property
    def usable_bytes(self) -> int:
        """Bytes that tensors, graphs and workspaces can share."""
        return self.memory_bytes - CUDA_CONTEXT_BYTES


KNOWN_DEVICES: dict[str, KnownDevice] = {
    device.name: device
    for device in (
        KnownDevice("a100", "sm_80", int(79.1 * _GIB), 2.039e12),  # SXM, 80 GB
        KnownDevice("a100-40g", "sm_80", int(39.3 * _GIB), 1.555e12),
        KnownDevice("rtx4090", "sm_89", int(23.5 * _GIB), 1.008e12),
        KnownDevice("l40s", "sm_89", int(44.3 * _GIB), 0.864e12),
        KnownDevice("h100", "sm_90", int(79.1 * _GIB), 3.35e12),  # SXM, 80 GB
        KnownDevice("h100-80g", "sm_90", int(79.1 * _GIB), 3.35e12),
        KnownDevice("h200", "sm_90", int(139.7 * _GIB), 4.8e12),
        KnownDevice("b200", "sm_100", int(178.0 * _GIB), 8.0e12),
    )
}


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Config):
    """The flags of `toka plan`: those of the server, with more devices."""

    device: str = flag(
        "auto", "device to plan for; it need not be here", choices=("auto", "cpu", "cuda", *KNOWN_DEVICES)
    )
    json: bool = flag(False, "print one line of JSON instead of a table")
