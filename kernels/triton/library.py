"""Gives `torch.ops.toka_triton.*` their implementation: importing this module does nothing, `load()` does.

Triton decides when it is first imported whether kernels are compiled for a GPU or interpreted on the CPU (TRITON_INTERPRET=1, for
tests), and that decides for which device the operators are registered.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

import toka.kernels.ops  # noqa: F401  (defines the operators that are implemented here)
from toka.errors import ConfigError

# Operator → the module that holds it, below this package; its function is called like the operator.
MODULES: dict[str, str] = {
    "adjust_logits": "adjust_logits",
    "encoder_attention": "encoder_attention",
    "linear": "linear",
    "merge_attention": "merge_attention",
    "paged_attention": "paged_attention",
    "rope_write_kv": "rope_write_kv",
    "sample": "sample",
    "sparse_logits": "sparse_logits",
    "sum_tokens": "sum_tokens",
    "token_logprobs": "token_logprobs",
    "write_kv": "write_kv",
}


def load() -> None:
    """Implement every operator of MODULES on CUDA devices, or on the CPU if Triton interprets; the second call does nothing.

    To be called once in the process that runs steps, before a graph with `toka_triton` operators runs. Raises ConfigError if Triton
    can't be imported.
    """
    _library()


def is_interpreting() -> bool:
    """Whether kernels run on CPU tensors by Triton's interpreter. Raises ConfigError if Triton can't be imported."""
    return bool(_triton().knobs.runtime.interpret)


def implementation(op: str) -> Callable[..., Any]:
    """The function behind `torch.ops.toka_triton.<op>`, with the same arguments."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"toka.kernels.triton.{MODULES[op]}"), op)
    return function


@functools.cache
def _library() -> torch.library.Library:
    """The registration, which lives as long as this object."""
    dispatch_key = "CPU" if is_interpreting() else "CUDA"
    library = torch.library.Library("toka_triton", "IMPL")
    for op in MODULES:
        library.impl(op, implementation(op), dispatch_key)
    return library


def _triton() -> Any:
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise ConfigError(
            f"Triton kernels need the package 'triton', which can't be imported ({error}): pip install 'triton>=3.6'."
        ) from error
