"""Which kernels a start chooses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from toka.warmup.code import families_of, kernel_chooser

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", ["paged_attention", "rope_write_kv"])
@pytest.mark.parametrize(("head_dim", "namespace"), [(256, "toka_cpp"), (320, "toka")])
def test_a_kernel_is_not_given_heads_that_it_cannot_take(op: str, head_dim: int, namespace: str) -> None:
    setup = SimpleNamespace(config=SimpleNamespace(batch_invariant=False), device=CPU)
    choose = kernel_chooser(setup, families_of(CPU))  # type: ignore[arg-type]
    assert choose(op, torch.empty(4, 2, head_dim, device="meta")).overload.namespace == namespace
