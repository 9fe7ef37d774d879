"""benchmarks/api_cost.py measures what it says: tokens that really came, for each kind of request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "api_cost.py"


def test_a_small_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--streams",
        "4",
        "--rate",
        "200",
        "--seconds",
        "1",
        "--json",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    report = json.loads((tmp_path / "out").read_text())
    kinds = [value for value in report.values() if isinstance(value, dict) and "tokens_per_s" in value]
    assert len(kinds) == 5
    for kind in kinds:
        assert 0 < kind["tokens_per_s"] <= 250
        assert kind["share_of_a_core"] >= 0
