"""A few of the cases that benchmarks/fuzz_api.py tries thousands of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="needs the extra toka[fuzz]")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fuzz_api import fuzz


def test_no_case_made_of_our_description_breaks_the_server() -> None:
    report = fuzz(num_cases=150, cases_a_round=4)
    assert report["faults"] == []
    assert report["healthy"]
    assert report["cases"] >= 150
    assert {"200", "400", "404"} <= {str(status) for status in report["statuses"]}
    assert len(report["operations"]) > 20
