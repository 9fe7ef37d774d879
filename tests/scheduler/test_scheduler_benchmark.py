from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "scheduler.py"


def test_its_last_line_is_json_with_the_figures_of_every_row_count(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(PROGRAM), "--quick", "--rows", "1,20", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(run.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    for figures in (report["rows"], report["rows_cached_pool"]):
        assert list(figures) == ["1", "20"]
        for row in figures.values():
            assert 0 < row["core_us"]["median"] < row["total_us"]["median"] and row["core_us"]["p95"] > 0
