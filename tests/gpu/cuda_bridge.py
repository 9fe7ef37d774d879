"""Lets tests that call `torch.ops.toka_triton.*` with CPU tensors run the kernels on a GPU: `pytest -p cuda_bridge --noconftest FILE`.

Each call copies its tensors to the GPU as they lie in memory, strides and shared storage included, runs the kernel there, and copies
back what it returns and what it wrote to. So the interpreter's tests (tests/kernels/interpreted) are the GPU's tests too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_registered: list[torch.library.Library] = []


def pytest_configure() -> None:
    """Register the bridge for CPU tensors, on all of Triton's operators."""
    import toka.kernels.ops  # noqa: F401  (defines the operators)
    from toka.kernels.triton import library

    library.load()
    registration = torch.library.Library("toka_triton", "IMPL")
    for op in library.MODULES:
        schema = getattr(torch.ops.toka_triton, op).default._schema
        registration.impl(op, bridged(library.implementation(op), schema, "cuda"), "CPU")
    _registered.append(registration)


def bridged(function: Callable[..., Any], schema: torch.FunctionSchema, device: str) -> Callable[..., Any]:
    """The function, computed on another device."""

    def call(*arguments: Any) -> Any:
        storages: dict[int, Tensor] = {}
        there = [_moved(each, storages, device) if isinstance(each, Tensor) else each for each in arguments]
        result = function(*there)
        for argument, here, moved in zip(schema.arguments, arguments, there, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                here.copy_(moved)
        if isinstance(result, tuple):
            return tuple(each.cpu() for each in result)
        return result.cpu() if isinstance(result, Tensor) else result

    return call


def _moved(tensor: Tensor, storages: dict[int, Tensor], device: str) -> Tensor:
    """A tensor with the same strides, over a copy of its storage; tensors that share one share the copy."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in storages:
        all_bytes = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        storages[storage.data_ptr()] = all_bytes.clone().to(device)
    copy = storages[storage.data_ptr()].untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
