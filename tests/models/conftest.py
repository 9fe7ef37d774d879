"""Runs a model over a paged cache as the runner does, and makes tiny transformers checkpoints to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from toka.models.decoder import CausalLM
from toka.models.inputs import ForwardInputs, KVCaches
from toka.models.registry import build_model
from toka.models.spec import read_spec
from toka.weights.loader import load_weights, open_checkpoint

BLOCK_SIZE = 4
NUM_BLOCKS = 64


class PagedRun:
    """A model with a KV cache and a block table of `max_rows` rows whose blocks are scattered and of mixed owners."""

    def __init__(self, model: CausalLM, max_rows: int = 4):
        self.model = model
        spec, dtype = model.spec, model.embed_tokens.weight.as_tensor().dtype
        shape = (NUM_BLOCKS, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        self.kv_caches: KVCaches = [
            (torch.full(shape, 7.0, dtype=dtype), torch.full(shape, 7.0, dtype=dtype)) for _ in model.layers
        ]
        blocks = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1)) + 1
        per_row = (NUM_BLOCKS - 1) // max_rows
        self.block_table = blocks[: max_rows * per_row].reshape(max_rows, per_row).to(torch.int32)
        self.seq_lens = [0] * max_rows

    def inputs(self, pieces: Sequence[tuple[int, Tensor]], num_padded_tokens: int = 0) -> tuple[Tensor, ForwardInputs]:
        """Token ids and inputs of a step in which each (row, token_ids) goes on with its row; padding at the end."""
        tokens, positions, slots, starts, lens = [], [], [], [0], []
        for row, token_ids in pieces:
            first = self.seq_lens[row]
            self.seq_lens[row] += len(token_ids)
            position = torch.arange(first, self.seq_lens[row])
            tokens.append(token_ids)
            positions.append(position)
            slots.append(self.block_table[row][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            starts.append(starts[-1] + len(token_ids))
            lens.append(self.seq_lens[row])
        pad = torch.zeros(num_padded_tokens, dtype=torch.int64)
        return torch.cat([*tokens, pad]), ForwardInputs(
            positions_T=torch.cat([*positions, pad]).to(torch.int32),
            slots_T=torch.cat([*slots, pad - 1]).to(torch.int32),
            block_table=self.block_table,
            rows_R=torch.tensor([row for row, _ in pieces], dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens_R=torch.tensor(lens, dtype=torch.int32),
        )

    @torch.inference_mode()
    def step(self, pieces: Sequence[tuple[int, Tensor]], num_padded_tokens: int = 0) -> list[Tensor]:
        """Logits [len(token_ids), V] of every piece."""
        token_ids, inputs = self.inputs(pieces, num_padded_tokens)
        logits = self.model.logits(self.model(token_ids, inputs, self.kv_caches))
        sizes = [len(token_ids) for _, token_ids in pieces]
        return list(logits[: sum(sizes)].split(sizes))


@pytest.fixture(scope="session")
def paged_run() -> type[PagedRun]:
    return PagedRun


def load(path: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> CausalLM:
    """toka's model of a checkpoint (a directory or a GGUF file)."""
    model = build_model(read_spec(config), dtype)
    load_weights(model, open_checkpoint(path))
    return model


@pytest.fixture(scope="session")
def load_model() -> Callable[..., CausalLM]:
    return load


@pytest.fixture(scope="session")
def randomise() -> Callable[[torch.nn.Module], None]:
    """Gives every parameter a value that matters: transformers starts biases at 0 and norms at 1."""

    def fill(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            spread = 0.5 if parameter.ndim == 1 else 0.15
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.normal_(centre, spread, generator=generator)

    return fill
