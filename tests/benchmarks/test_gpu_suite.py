"""The GPU suite's dry run: every section on a tiny model on the CPU, also where toka and some of its packages are not installed."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = BENCHMARKS / "gpu_suite.py"
MISSING = ("fastapi", "gguf", "msgspec", "openai", "orjson", "pydra", "zmq")
# What python runs when it starts (as sitecustomize.py): only stand-ins of the missing packages are found, and no installed toka.
BARE_MACHINE = f"""
import sys
from importlib.machinery import PathFinder

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is None and name in {MISSING}:
            spec = PathFinder.find_spec(name)
            if spec is not None and "toka-tree-" in spec.origin:
                return spec
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path[:] = [Missing] + [finder for finder in sys.meta_path if "toka" not in getattr(finder, "__module__", "")]
"""


def run_suite(*flags: str, cache: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the report."""
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--eager", "--cache", str(cache), *flags]
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(command, capture_output=True, text=True, env=given, timeout=400)
    assert run.stdout, run.stderr
    return run.returncode, json.loads(run.stdout.splitlines()[-1])


def test_every_section_on_a_tiny_model(cpp_kernels: Path, cache_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    status, report = run_suite("--json", str(out), cache=cache_dir)
    assert (status, report["errors"]) == (0, [])
    assert json.loads(out.read_text()).keys() == report.keys()
    assert report["machine"]["copy_gb_per_s"] > 0 and report["machine"]["matmul_tflop_per_s"] > 0
    assert len(report["kernels"]) == 4
    for figures in report["kernels"].values():
        assert figures["toka_off"] < 1e-5 and figures["flex_off"] < 1e-5
        assert figures["over_sdpa"] > 0 and figures["over_flex"] > 0
    assert list(report["sampler"]) == ["greedy_1", "filtered_1", "greedy_3", "filtered_3"]
    assert list(report["hydragen"]) == ["d32_2_share_64_and_9", "d32_5_share_64_and_9"]
    for figures in report["hydragen"].values():
        assert figures["over_plain"] > 0 and figures["unused_ms"] > 0 and figures["off"] < 1e-5
    step = report["step"]["tiny"]
    assert list(step) == ["limits", "decode_1", "decode_4", "prefill_16", "prefill_64"]
    assert all(figures["ms"] > 0 for name, figures in step.items() if name != "limits")
    for batch, figures in report["engine"]["tiny"].items():
        assert figures["steps"] == 6 and figures["next_plan_us_per_step"] > 0
        assert report["peer"]["tiny"][batch]["tokens_per_s"] > 0
    assert list(report["start"]["tiny"]) == ["cold", "warm"]
    monkeys = report["monkeys"]["tiny"]["run"]
    assert monkeys["samples"] == 8 and not monkeys["was_cut"] and monkeys["cached_share_of_prompts"] > 0
    assert list(report["summary"]["tiny_over_transformers"]) == ["1", "3"]


def test_a_bare_checkout(cpp_kernels: Path, cache_dir: Path, tmp_path: Path) -> None:
    """toka is not installed, and packages that its server and its file formats need are missing."""
    (tmp_path / "sitecustomize.py").write_text(BARE_MACHINE)
    environment = {"PYTHONPATH": str(tmp_path)}
    for name in ("toka", *MISSING):
        imported = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=tmp_path, env=os.environ | environment, capture_output=True
        )
        assert imported.returncode == 1, name
    status, report = run_suite("--sections", "c", cache=cache_dir, **environment)
    assert (status, report["errors"]) == (0, [])
    assert sorted(report["stand_ins"]) == ["gguf", "msgspec"]
    assert report["step"]["tiny"]["decode_4"]["ms"] > 0


def test_a_failure_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    no_directory = tmp_path / "cache"
    no_directory.write_text("")
    status, report = run_suite("--sections", "machine,step", cache=no_directory)
    assert status == 1
    assert report["machine"]["copy_gb_per_s"] > 0
    assert [error["section"] for error in report["errors"]] == ["start", "step"]
    assert str(no_directory) in report["errors"][0]["error"]


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    status, report = run_suite("--budget-s", "1", cache=tmp_path)
    assert status == 1 and report["seconds"] < 10
    noted = {error["section"]: error["error"] for error in report["errors"]}
    assert noted.keys() == {
        "machine, kernels, sampler, hydragen",
        "start, step, engine, monkeys",
        "peer",
        "start",
        "tune",
    }
    assert set(noted.values()) == {"not begun: no time left"}


@pytest.mark.parametrize(("flags", "message"), [(("--sections", "z"), "'z'"), (("--shape", "70b"), "'70b'")])
def test_unknown_names_are_refused(flags: tuple[str, ...], message: str) -> None:
    run = subprocess.run([sys.executable, str(PROGRAM), *flags], capture_output=True, text=True)
    assert run.returncode == 2 and message in run.stderr


@pytest.fixture
def gpu_suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_suite")


def test_after_a_crash_the_other_sections_get_a_new_engine(
    gpu_suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def crash_in_step(self: Any, work: Any) -> str | None:
        names = [name for name, _ in work.sections]
        begun.append((work.start_key, names))
        return "step" if "step" in names else None

    monkeypatch.setattr(gpu_suite.Suite, "_run_process", crash_in_step)
    suite = gpu_suite.Suite(argparse.Namespace(budget_s=100.0, json=None), Path(), io.StringIO())
    suite.run(gpu_suite.Work("1b", (("start", 9.0), ("step", 9.0), ("engine", 9.0)), "cold"))
    assert begun == [("cold", ["start", "step", "engine"]), ("after_failure", ["start", "engine"])]


def test_a_section_that_takes_too_long_is_cut_off(gpu_suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"begin": "step"}\n{"section": "step", "key": "decode_1", "value": {"ms": 1.0}}'
    processes = []

    def start_sleeper(command: list[str], **others: Any) -> subprocess.Popen[str]:
        code = f"import time; print({said!r}, flush=True); time.sleep(60)"
        others["stderr"] = None
        processes.append(popen([sys.executable, "-c", code], **others))
        return processes[0]

    popen = subprocess.Popen
    monkeypatch.setattr(gpu_suite.subprocess, "Popen", start_sleeper)
    monkeypatch.setattr(gpu_suite, "GRACE_S", 1.0)
    monkeypatch.setattr(gpu_suite, "LEAST_S", 0.1)
    options = argparse.Namespace(budget_s=100.0, json=None, device="cpu", eager=True, stand_ins=[])
    suite = gpu_suite.Suite(options, Path(), io.StringIO())
    suite.run(gpu_suite.Work("1b", (("step", 1.0),)))
    assert suite.errors == [{"section": "step", "shape": "1b", "error": "cut off after 2 s"}]
    assert suite.results == {"step": {"1b": {"decode_1": {"ms": 1.0}}}}
    assert processes[0].returncode is not None  # it was stopped


def test_the_most_valuable_comes_first(gpu_suite: ModuleType) -> None:
    work = gpu_suite.plan_work(set(gpu_suite.SECTIONS.values()), ["8b", "1b"])
    assert [(each.shape, each.start_key, *(name for name, _ in each.sections)) for each in work] == [
        ("8b", "", "machine", "kernels", "sampler", "hydragen"),
        ("8b", "cold", "start", "step", "engine", "monkeys"),
        ("8b", "", "peer"),
        ("1b", "cold", "start", "step", "engine", "monkeys"),
        ("1b", "", "peer"),
        ("1b", "warm", "start"),
        ("8b", "warm", "start"),
        ("8b", "", "tune"),
    ]


def test_launch_parameters_are_tuned_while_there_is_time(gpu_suite: ModuleType) -> None:
    from gpu_sections.measure import Deadline
    from gpu_sections.tuning import tune

    from toka.kernels.triton.tuning import LaunchParameters, TuningTable

    table = TuningTable()
    candidates = [LaunchParameters.of(warps, 2, BLOCK=64) for warps in (2, 4, 8, 16)]
    table.declare("first", lambda capability, key: candidates)
    table.declare("second", lambda capability, key: candidates)

    def run() -> tuple[LaunchParameters, LaunchParameters]:
        return table.lookup("first", (9, 0), (64,)), table.lookup("second", (9, 0), (64, "bf16"))

    def milliseconds() -> float:
        warps = run()[0].num_warps
        if warps == 16:
            raise RuntimeError("out of resource: shared memory")
        return abs(warps - 8) + 0.5

    assert dict(tune(table, run, milliseconds, Deadline(0.0))) == {}
    tuned = dict(tune(table, run, milliseconds, Deadline(60.0)))
    assert tuned["first_64"] == {
        "best": "BLOCK=64 warps=8 stages=2",
        "shipped": "BLOCK=64 warps=2 stages=2",
        "ms": {f"BLOCK=64 warps={warps} stages=2": abs(warps - 8) + 0.5 for warps in (2, 4, 8)},
    }
    assert list(tuned) == ["first_64", "second_64_bf16"] and table.seen() == ()
