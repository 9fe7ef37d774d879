"""What every benchmark ends with: its figures as JSON, with the commit, machine and versions that they belong to. No torch needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toka.config import num_available_cores

HERE = Path(__file__).parent


def publish(report: dict[str, Any], path: Path | None) -> None:
    """Print the report on one line, the last of the output, and write it to path too, if there is one."""
    text = json.dumps(report | {"environment": environment()})
    if path is not None:
        path.write_text(text + "\n")
    print(text)


def environment() -> dict[str, Any]:
    """Commit, machine and versions of what is installed."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    return {
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "cores": num_available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {"python": sys.version.split()[0], **_versions("torch", "transformers", "numpy")},
    }


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
