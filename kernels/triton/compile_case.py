"""Kernels compiled for a GPU that need not be there: proof that they compile, and what registers they take.

Every module of this package that holds kernels lists them as `COMPILE_CASES`, one case for each variant that serving uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel with types and constants fixed.

    kernel: the `triton.jit` function. signature: argument → Triton's type ("*bf16", "i32", "fp32", ...), "constexpr" for constants.
    constants: values of the constants. num_warps, num_stages: as it is launched.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
