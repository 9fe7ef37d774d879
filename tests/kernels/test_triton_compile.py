"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, on a machine with no GPU, and keeps its values in registers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toka.kernels.triton import compile_check
from toka.kernels.triton.compile_check import ARCHITECTURES, Resources, cases_of, compile_all, modules_with_cases, table
from toka.kernels.triton.library import MODULES


@pytest.fixture(scope="module")
def compiled() -> list[Resources]:
    return compile_all()


def test_every_case_compiles_and_keeps_its_values_in_registers(
    compiled: list[Resources], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n{table(compiled)}")
    wanted = {
        (case.name, architecture)
        for module in modules_with_cases()
        for case in cases_of(module)
        for architecture in case.architectures or ARCHITECTURES
    }
    assert {(r.name, r.architecture) for r in compiled} == wanted
    spilled = [r for r in compiled if r.spilled_bytes]
    assert not spilled, f"\n{table(spilled)}"


@pytest.mark.parametrize(
    "kind",
    [
        *("decode", "decode after shared", "shared prefix", "prefill", "combine splits", "combine with shared"),
        *sorted({*MODULES} - {"paged_attention"}),
    ],
)
def test_every_operator_is_shipped_for_every_architecture(compiled: list[Resources], kind: str) -> None:
    assert {r.architecture for r in compiled if r.name.startswith(kind)} == set(ARCHITECTURES)


def test_two_programs_of_decode_fit_a_multiprocessor(compiled: list[Resources]) -> None:
    """As decode_attention's number of programs takes for granted. Shared memory and registers of a multiprocessor: CUDA's guide."""
    shared_kib = {80: 164, 90: 228, 100: 228}
    for r in compiled:
        if r.name.startswith("decode"):
            assert 2 * r.shared_bytes <= shared_kib[r.architecture] << 10
            assert 2 * r.registers * r.num_warps * 32 <= 1 << 16


def test_spills_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in cases_of("toka.kernels.triton.attention_cases") if c.name.startswith("prefill d64"))
    starved = replace(case, options={**case.options, "maxnreg": 64})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compile_check.compile_case(starved, 80).spilled_bytes > 0


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown architecture 'hopper': say for example sm_90"):
        compile_check.main(["hopper"])
