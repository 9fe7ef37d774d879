"""Nothing that the engine holds grows after ready: 20,000 requests of every kind leave the process as large as the first 2,000."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NUM_REQUESTS = 20_000
NUM_SAMPLES = 10  # of what the process holds, evenly over the run
MAX_GROWTH_BYTES = 4 * 2**20  # from the first sample to the last: what the C library's allocator leaves in pieces
MAX_OBJECTS_PER_REQUEST = 1 / 50  # of Python's, from the first sample to the last


@pytest.fixture(scope="module")
def run(random_checkpoint: Callable[[str], Path], cache_dir: Path) -> dict[str, Any]:
    """What long_run.py reports."""
    script = Path(__file__).parent / "long_run.py"
    words = [str(random_checkpoint("llama")), str(cache_dir), str(NUM_REQUESTS), str(NUM_SAMPLES)]
    done = subprocess.run(
        [sys.executable, str(script), *words], stdout=subprocess.PIPE, text=True, timeout=800, cwd=os.sep, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_resident_memory_is_flat(run: dict[str, Any]) -> None:
    resident = [each["resident_bytes"] for each in run["held"]]
    assert len(resident) == NUM_SAMPLES
    assert resident[-1] - resident[0] < MAX_GROWTH_BYTES, resident


def test_no_object_stays_behind_a_request(run: dict[str, Any]) -> None:
    objects = [each["objects"] for each in run["held"]]
    requests = run["held"][-1]["num_requests"] - run["held"][0]["num_requests"]
    assert objects[-1] - objects[0] < MAX_OBJECTS_PER_REQUEST * requests, objects


def test_the_traffic_was_of_every_kind(run: dict[str, Any]) -> None:
    assert min(run["ends"][reason] for reason in ("LENGTH", "STOP", "ABORT")) > 50
    assert sum(run["ends"].values()) > NUM_REQUESTS  # samples: some requests have several
    assert run["cached_prompt_tokens"] > NUM_REQUESTS
    assert run["blocks_in_use"] == 0
    assert run["compiles_after_ready"] == 0
