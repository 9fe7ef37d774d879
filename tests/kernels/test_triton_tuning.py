"""Launch parameters: what is shipped, measured, kept and frozen."""

from __future__ import annotations

import json
import math

import pytest

from toka.errors import ConfigError, InvariantError
from toka.kernels.triton.tuning import Capability, Key, LaunchParameters, TuningTable

SMALL, LARGE = LaunchParameters.of(4, 2, max_registers=96, BLOCK_N=32), LaunchParameters.of(8, 3, BLOCK_N=128)
HOPPER: Capability = (9, 0)
KEY: Key = (128, "bfloat16")


def candidates(capability: Capability, key: Key) -> list[LaunchParameters]:
    return [LARGE, SMALL, LARGE] if capability >= HOPPER else [SMALL]


@pytest.fixture
def table() -> TuningTable:
    table = TuningTable()
    table.declare("kernel", candidates)
    return table


def test_the_shipped_choice_comes_first(table: TuningTable) -> None:
    assert table.candidates("kernel", HOPPER, KEY) == (LARGE, SMALL)
    assert table.lookup("kernel", HOPPER, KEY) == LARGE
    assert table.lookup("kernel", (8, 0), KEY) == SMALL
    assert LARGE["BLOCK_N"] == 128
    assert LARGE.keywords == {"BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert SMALL.options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 96}


def test_tuning_records_the_fastest_and_runs_each_as_lookup_answers(table: TuningTable) -> None:
    table.lookup("kernel", HOPPER, KEY)
    assert table.seen() == (("kernel", HOPPER, KEY),)
    measured = []

    def run(parameters: LaunchParameters) -> float:
        measured.append(table.lookup("kernel", HOPPER, KEY))
        return math.inf if parameters == LARGE else 3.0

    assert table.tune("kernel", HOPPER, KEY, run) == SMALL
    assert measured == [LARGE, SMALL]
    assert table.lookup("kernel", HOPPER, KEY) == SMALL
    assert table.lookup("kernel", HOPPER, (64, "bfloat16")) == LARGE
    assert table.seen() == (("kernel", HOPPER, (64, "bfloat16")),)


def test_a_failed_measurement_leaves_the_table_as_it_was(table: TuningTable) -> None:
    def broken(parameters: LaunchParameters) -> float:
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        table.tune("kernel", HOPPER, KEY, broken)
    assert table.lookup("kernel", HOPPER, KEY) == LARGE
    with pytest.raises(ConfigError, match="no launch parameters of Triton kernel kernel fit"):
        table.tune("kernel", HOPPER, KEY, lambda parameters: math.inf)
    assert table.lookup("kernel", HOPPER, KEY) == LARGE


def test_frozen_is_frozen(table: TuningTable) -> None:
    saved = table.to_json()
    table.freeze()
    with pytest.raises(InvariantError, match=r"can't tune: .*frozen"):
        table.tune("kernel", HOPPER, KEY, lambda parameters: 1.0)
    with pytest.raises(InvariantError, match="can't load a table"):
        table.load_json(saved)
    assert table.lookup("kernel", HOPPER, KEY) == LARGE


def test_the_table_survives_json(table: TuningTable) -> None:
    table.tune("kernel", HOPPER, KEY, lambda parameters: parameters["BLOCK_N"])
    saved = json.loads(json.dumps(table.to_json()))
    other = TuningTable()
    other.declare("kernel", candidates)
    other.load_json(saved)
    assert other.lookup("kernel", HOPPER, KEY) == SMALL and other.to_json() == table.to_json()


def test_a_wrong_table_is_refused(table: TuningTable) -> None:
    with pytest.raises(ConfigError, match="has version 0, this toka reads 1"):
        table.load_json({"version": 0, "entries": []})
    with pytest.raises(ConfigError, match="damaged: KeyError: 'capability'"):
        table.load_json({"version": 1, "entries": [{"kernel": "kernel"}]})


def test_a_kernel_is_declared_once(table: TuningTable) -> None:
    with pytest.raises(InvariantError, match="declared twice"):
        table.declare("kernel", candidates)
