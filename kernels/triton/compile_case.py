"""Kernels compiled for a GPU that need not be there: proof that they compile, and what registers they take.

Every module of this package that holds kernels lists them as `COMPILE_CASES`, one case for each variant that serving uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel with types and constants fixed.

    kernel: the `triton.jit` function. signature: argument → Triton's type ("*bf16", "i32", "fp32", ...), "constexpr" for constants.
    constants: values of the constants. options: Triton's, as it is launched (`LaunchParameters.options`).
    architectures: for which it is meant, for example (80, 90) for sm_80 and sm_90; empty = all.
    unaligned: pointers and integers that are no multiples of 16 when the kernel is launched. Those that the kernel does not
    specialise on (`do_not_specialize`, `do_not_specialize_on_alignment`) need not be named.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    architectures: tuple[int, ...] = ()
    unaligned: tuple[str, ...] = ()


def signature_of(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, str]:
    """The signature in the order of the arguments: `types` where it says so, "constexpr" for `constants`, "i32" for the rest."""
    known = {**dict.fromkeys(constants, "constexpr"), **types}
    return {name: known.get(name, "i32") for name in kernel.arg_names}
