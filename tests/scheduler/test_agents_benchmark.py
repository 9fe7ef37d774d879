"""benchmarks/agents.py, simulated: its report, and that retention by worth does what it is for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "agents.py"
POLICIES = ("worth", "worth_no_session_id", "lru", "no_cache")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("agents") / "result.json"
    command = [sys.executable, str(PROGRAM), "--sessions", "8", "--turns", "4", "--stream", "3", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    return report


def test_every_policy_has_its_figures(report: dict[str, Any]) -> None:
    assert set(report) == {"load", "environment", *POLICIES}
    for policy in POLICIES:
        figures = report[policy]
        assert len(figures["ttft_ms_by_turn"]) == 4 and min(figures["ttft_ms_by_turn"]) > 0
        assert figures["tokens_per_s_per_user"] > 0 and figures["stream_requests"] > 0


def test_sessions_find_their_prefix_again_where_plain_lru_lost_it(report: dict[str, Any]) -> None:
    assert report["worth"]["reused_share"] >= 0.98
    assert report["lru"]["reused_share"] < report["worth_no_session_id"]["reused_share"]
    assert report["lru"]["reused_share"] < 0.5 and report["no_cache"]["reused_share"] == 0.0
    assert report["worth"]["tokens_per_s_per_user"] > report["lru"]["tokens_per_s_per_user"]
    for turn in (1, 2, 3):
        assert report["worth"]["ttft_ms_by_turn"][turn] < report["lru"]["ttft_ms_by_turn"][turn]


def test_it_imports_no_torch() -> None:
    check = f"import runpy, sys; runpy.run_path({str(PROGRAM)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PROGRAM.parent)
