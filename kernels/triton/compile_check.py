"""Compiles the kernels of this package for GPUs that need not be there, and tells what each takes of a multiprocessor.

    python -m toka.kernels.triton.compile_check [sm_80 sm_90 sm_100]

prints a table. Needs Triton with its own ptxas and cuobjdump, no CUDA. Triton's cache is not used: everything is compiled anew.
"""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toka.kernels.triton
from toka.errors import ConfigError, InvariantError
from toka.kernels.triton.compile_case import CompileCase
from toka.kernels.triton.library import is_interpreting

ARCHITECTURES = (80, 90, 100)
WARP_SIZE = 32


@dataclass(frozen=True, order=True)
class Resources:
    """What one compiled kernel takes. registers: of a thread. spilled_bytes: local memory of a thread. shared_bytes: of a program."""

    name: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    cubin_bytes: int


def modules_with_cases() -> list[str]:
    """Names of this package's modules that list COMPILE_CASES."""
    names = [
        f"{toka.kernels.triton.__name__}.{info.name}" for info in pkgutil.iter_modules(toka.kernels.triton.__path__)
    ]
    return [name for name in names if name != __name__ and hasattr(importlib.import_module(name), "COMPILE_CASES")]


def cases_of(module: str) -> Sequence[CompileCase]:
    cases: Sequence[CompileCase] = importlib.import_module(module).COMPILE_CASES
    return cases


def compile_all(
    architectures: Iterable[int] = ARCHITECTURES, modules: Iterable[str] | None = None, num_processes: int = 2
) -> list[Resources]:
    """Compile every case of the modules (None = all) for each architecture that it is meant for.

    architectures: 90 stands for sm_90. Raises ConfigError under TRITON_INTERPRET=1, InvariantError for a kernel that does not compile.
    """
    if is_interpreting():
        raise ConfigError("Triton compiles nothing while it interprets: unset TRITON_INTERPRET.")
    jobs = [
        (module, index, architecture)
        for module in (modules_with_cases() if modules is None else modules)
        for index, case in enumerate(cases_of(module))
        for architecture in architectures
        if not case.architectures or architecture in case.architectures
    ]
    with tempfile.TemporaryDirectory(prefix="toka-triton-") as cache_dir:
        pool = ProcessPoolExecutor(
            num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_use_cache,
            initargs=(cache_dir,),
        )
        with pool:
            return sorted(pool.map(_compile_job, jobs))


def compile_case(case: CompileCase, architecture: int) -> Resources:
    """Compile one case through Triton, down to the GPU's instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=case.kernel, signature=dict(case.signature), constexprs=dict(case.constants), attrs=_alignments(case)
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, WARP_SIZE), options=dict(case.options))
    cubin: bytes = compiled.asm["cubin"]
    registers, spilled_bytes = _usage(cubin)
    return Resources(
        case.name,
        architecture,
        registers,
        spilled_bytes,
        compiled.metadata.shared,
        case.options["num_warps"],
        len(cubin),
    )


def table(resources: Iterable[Resources]) -> str:
    """The resources as lines of text."""
    lines = [f"{'kernel':<58} {'arch':<7} {'registers':>9} {'spills B':>8} {'shared B':>9} {'warps':>5} {'cubin B':>8}"]
    lines += [
        f"{r.name:<58} {f'sm_{r.architecture}':<7} {r.registers:>9} {r.spilled_bytes:>8} {r.shared_bytes:>9} {r.num_warps:>5} "
        f"{r.cubin_bytes:>8}"
        for r in resources
    ]
    return "\n".join(lines)


def _use_cache(directory: str) -> None:
    import triton

    triton.knobs.cache.dir = directory


def _compile_job(job: tuple[str, int, int]) -> Resources:
    module, index, architecture = job
    case = cases_of(module)[index]
    try:
        return compile_case(case, architecture)
    except Exception as error:  # whatever Triton and ptxas raise
        raise InvariantError(f"{module}: {case.name!r} does not compile for sm_{architecture}: {error}") from error


def _alignments(case: CompileCase) -> dict[tuple[int], list[list[Any]]]:
    """As the launcher would find them: pointers and integers that are multiples of 16, unless the kernel does not look."""
    return {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in case.kernel.params
        if case.signature[parameter.name].startswith(("*", "i32", "i64"))
        and parameter.name not in case.unaligned
        and not parameter.do_not_specialize
        and not parameter.do_not_specialize_on_alignment
    }


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, from the compiled kernel."""
    import triton

    with tempfile.TemporaryDirectory(prefix="toka-cubin-") as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", printed)
    if found is None:
        raise ConfigError(f"can't read what {command[0]} prints: {printed[:300]!r}")
    registers, stack_bytes, local_bytes = map(int, found.groups())
    return registers, stack_bytes + local_bytes


def main(arguments: Sequence[str]) -> None:
    """Print the table for architectures given as sm_90 (none = all)."""
    wrong = [argument for argument in arguments if not re.fullmatch(r"sm_\d+", argument)]
    if wrong:
        raise SystemExit(f"unknown architecture {wrong[0]!r}: say for example sm_90")
    print(table(compile_all([int(argument.removeprefix("sm_")) for argument in arguments] or ARCHITECTURES)))


if __name__ == "__main__":
    main(sys.argv[1:])
