"""What the figures were taken on: the device, its limits as measured, and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from gpu_sections.measure import copy_gb_per_s, matmul_tflop_per_s

PACKAGES = ("torch", "triton", "transformers", "numpy", "flashinfer-python")


def measure(device: torch.device) -> Iterator[tuple[str, Any]]:
    """Yields the device's name and size, the versions, and the limits."""
    facts: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    yield "facts", facts
    yield "copy_gb_per_s", copy_gb_per_s(device)
    yield "matmul_tflop_per_s", matmul_tflop_per_s(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
