"""The device of the tests in this room."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and PyTorch sees none here")
    return "cuda"
