"""Every Triton kernel on a GPU against the reference: the interpreter's tests through cuda_bridge.py, attention of odd shapes, and
each operator captured in a CUDA graph.

Legend: T tokens, H query heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from toka.kernels.triton.library import MODULES

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
KERNELS = HERE.parent / "kernels"
NOT_OF_KERNELS = {"test_triton_step"}  # asks which kernels are chosen for a CPU
FILES = sorted(file for file in (KERNELS / "interpreted").glob("test_*.py") if file.stem not in NOT_OF_KERNELS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_triton_"))
def test_the_interpreters_tests(device: str, file: Path) -> None:
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "cuda_bridge",
        "--noconftest",
        str(file),
    ]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.fixture(scope="module")
def triton_kernels(device: str) -> None:
    from toka.kernels.triton.library import load

    load()


def module_of(file: Path) -> Any:
    """A file of tests, for what it makes its cases with."""
    spec = importlib.util.spec_from_file_location(f"cases_of_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shared_cases(triton_kernels: None) -> Any:
    return module_of(KERNELS / "interpreted" / "test_triton_shared_attention.py")


@pytest.fixture(scope="module")
def attention_cases(triton_kernels: None) -> Any:
    return module_of(KERNELS / "test_triton_attention.py")


ROWS = [(1, 1), (1, 255), (1, 256), (1, 257), (33, 65), (2, 3000), (130, 130)]


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (32, 8), (7, 1), (40, 8)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_attention(device: str, attention_cases: Any, block_size: int, heads: tuple[int, int], head_dim: int) -> None:
    batch = attention_cases.make_batch(
        ROWS, heads=heads, head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16, padded_rows=1
    )
    expected_THD = attention_cases.reference_of(batch)
    actual_THD = torch.ops.toka_triton.paged_attention.default(*batch.to(device).arguments)
    torch.testing.assert_close(actual_THD.cpu(), expected_THD, atol=2e-2, rtol=2e-2)


def test_a_decode_row_is_the_same_to_the_bit_whatever_runs_beside_it(device: str, attention_cases: Any) -> None:
    batch = attention_cases.make_batch(ROWS, heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    op = torch.ops.toka_triton.paged_attention.default
    together_THD = op(*batch.to(device).arguments)
    for i in range(4):
        begin, end = int(batch.query_start[i]), int(batch.query_start[i + 1])
        alone_THD = op(*batch.alone(i).to(device).arguments)
        assert torch.equal(alone_THD, together_THD[begin:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (16, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_shared_prefixes(
    device: str, shared_cases: Any, head_dim: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Many members, several levels, splits, and rows in no group."""
    groups = [
        shared_cases.Group(0, range(5, 205), 0, 1024),
        shared_cases.Group(1, range(6, 100, 2), 1024, 1344),
        shared_cases.Group(2, range(20, 60, 4), 1344, 1408),
    ]
    lens = [1409 + 3 * i for i in range(210)]
    batch = shared_cases.make_batch(lens, groups, prefills=[70], heads=heads, head_dim=head_dim, dtype=dtype)
    actual_THD = torch.ops.toka_triton.paged_attention.default(*on(device, batch.arguments))
    shared_cases.assert_close(actual_THD.cpu(), batch.reference())


def test_a_captured_step_follows_its_groups(device: str, shared_cases: Any) -> None:
    """Captured without any, replayed with some, with others, and again without."""
    steps = [
        shared_cases.make_batch(shared_cases.SIX, groups, dtype=torch.bfloat16, num_lines=10)
        for groups in ([], shared_cases.CASES["nested"], shared_cases.CASES["two groups"], [])
    ]
    static = on(device, steps[0].arguments)
    op = torch.ops.toka_triton.paged_attention.default
    op(*static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_THD = op(*static)
    for step in steps:
        for there, here in zip(static, step.arguments, strict=True):
            if isinstance(here, torch.Tensor):
                there.copy_(here)
        graph.replay()
        shared_cases.assert_close(out_THD.cpu(), step.reference())


def test_merge_attention(device: str, triton_kernels: None) -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 1, 64), (3, 4, 2, 80), (17, 2, 3, 128), (5, 300, 32, 128)):
        output_STHD = torch.randn(shape, generator=random)
        lse_STH = torch.randn(shape[:3], generator=random) * 20
        lse_STH[0] = -float("inf")
        output_STHD[0] = float("nan")  # what no key contributed to is undefined
        expected = torch.ops.toka.merge_attention.default(output_STHD, lse_STH)
        actual = torch.ops.toka_triton.merge_attention.default(output_STHD.to(device), lse_STH.to(device))
        for there, here in zip(actual, expected, strict=True):
            torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=1e-5)


def on(device: str, arguments: tuple[Any, ...]) -> list[Any]:
    return [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]


def in_parts(result: Any) -> list[torch.Tensor]:
    return [] if result is None else list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("lens", [[5, 1, 9], [1], [1, 1, 1, 1]], ids=str)
def test_a_captured_launch_follows_its_inputs(device: str, triton_kernels: None, op: str, lens: list[int]) -> None:
    """A graph captured with some numbers computes others: nothing of a tensor's contents went into the launch."""
    cases = module_of(KERNELS / "test_ops.py")
    torch.manual_seed(0)
    first, second = cases.arguments(op, lens), cases.arguments(op, lens)
    static = [each.to(device) if isinstance(each, torch.Tensor) else each for each in first]
    kernel = getattr(torch.ops.toka_triton, op).default
    kernel(*static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernel(*static)
    for there, here in zip(static, second, strict=True):
        if isinstance(here, torch.Tensor):
            there.copy_(here)
    graph.replay()
    expected = getattr(torch.ops.toka, op).default(*second)
    for there, here in zip(in_parts(result), in_parts(expected), strict=True):
        torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)
    for there, here in zip(static, second, strict=True):
        if isinstance(here, torch.Tensor):
            torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=1e-5)
