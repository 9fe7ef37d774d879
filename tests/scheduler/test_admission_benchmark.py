"""benchmarks/admission.py on a short trace: its report, and that foresight lets more in without paying for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "admission.py"


def test_the_forecast_with_predictions_finishes_more_and_recomputes_little(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(PROGRAM), "--requests", "900", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(run.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    for trace in ("sharegpt_like", "shift"):
        for policy in ("reserve_max", "when_free", "forecast", "forecast_and_predictor"):
            figures = report[trace][policy]
            assert figures["mean_batch"] > 1 and figures["finished_per_1000_steps"] > 0
            assert figures["preemptions_per_request"] >= 0 and 0 <= figures["recomputed_share"] < 1
        assert report[trace]["forecast_and_predictor"]["over_reserve_max"] >= 1.3
        assert report[trace]["forecast_and_predictor"]["recomputed_share"] <= 0.02
        assert report[trace]["forecast"]["preemptions_per_request"] == 0
