"""The last stage: a step that was run once becomes one launch (floor 4).

On CUDA the step's kernels are recorded into a CUDA graph, whose replay is one launch for the host however many kernels it holds.
Elsewhere there is nothing to record, and a replay calls the step again: the same interface, so that the logic around it is the same
on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Outputs = tuple[torch.Tensor, ...]


class Replay(Protocol):
    """A captured step."""

    def __call__(self) -> Outputs:
        """Run the step on what its input tensors hold now. On CUDA: launched, not awaited, and the next replay of any step captured by
        the same Capturer may write over the outputs: they belong to the shared pool, not to whoever holds them."""
        ...


class Capturer:
    """Captures steps of one model. On CUDA they share one memory pool, so they must never run at the same time, and the largest
    should come first: smaller ones then live in its memory.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_cuda else None

    def capture(self, step: Callable[[], Outputs]) -> Replay:
        """Run `step` once, so that whatever happens only the first time has happened, and capture it.

        step: must read and write tensors that never move, and must not wait for the device.
        """
        step()
        if not self._on_cuda:
            return step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            recorded = step()
        # Owned tensors would keep their memory from the captures that follow: the logits of every bucket instead of the largest one's.
        outputs = tuple(_borrowed(tensor) for tensor in recorded)
        del recorded

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class _DeviceMemory:
    """Memory on the GPU that somebody else owns, as PyTorch takes it (the CUDA array interface, version 3)."""

    def __init__(self, pointer: int, num_bytes: int):
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def _borrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor in the same memory, which it does not keep."""
    storage = tensor.untyped_storage()
    memory = torch.as_tensor(_DeviceMemory(storage.data_ptr(), storage.nbytes()), device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
