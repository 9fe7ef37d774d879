"""Tests of Triton kernels on the CPU. Triton decides when it is imported whether it interprets, so they need a process of their own:
`tests/kernels/test_triton_interpreted.py` runs each file in one, with TRITON_INTERPRET=1; any other process passes them over.
"""

from __future__ import annotations

import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def triton_kernels() -> None:
    """The Triton kernels, registered for CPU tensors."""
    from toka.kernels.triton.library import load

    load()
