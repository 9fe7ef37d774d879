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
    assert list(report["rows"]) == list(report["rows_cached_pool"]) == ["1", "20"]
    assert list(report["context"]) == ["512", "4096", "16384"]
    for figures in (report["rows"], report["rows_cached_pool"], report["context"]):
        for row in figures.values():
            assert set(row["core_us"]) == set(row["total_us"]) == {"median", "mean", "p95"}
            assert 0 < row["core_us"]["median"] < row["total_us"]["median"] and row["core_us"]["p95"] > 0
    assert set(report["forecast_us"]) == {"1024", "8192"} and min(report["forecast_us"].values()) > 0
    assert report["shared_prefix_us"]["1024"] > 0


def test_it_imports_no_torch() -> None:
    check = f"import runpy, sys; runpy.run_path({str(PROGRAM)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PROGRAM.parent)
