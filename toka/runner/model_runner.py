"""Runs plans: changes to the tables, inputs into their bucket, the compiled step, sampled ids back (floor 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from toka.compile.bucket import bucket_of, ladder
from toka.compile.compiled_model import CompiledModel
from toka.plan import BatchPlan, StepResult
from toka.runner.device_tables import DeviceTables
from toka.runner.kv_cache import KVCache
from toka.runner.step_buffers import Bucket, StepBuffers


@dataclass(frozen=True)
class RunnerSizes:
    """max_tokens, max_rows: in one step. max_table_rows: rows of the request table. max_blocks_per_row: of one request."""

    max_tokens: int
    max_rows: int
    max_table_rows: int
    max_blocks_per_row: int


class ModelRunner:
    """Owns all state on the device but the weights. Not thread-safe: one thread runs steps, in order."""

    def __init__(self, compiled: CompiledModel, sizes: RunnerSizes, device: torch.device):
        self.compiled, self.sizes = compiled, sizes
        self.token_sizes = ladder(sizes.max_tokens)
        self.sample_sizes = ladder(sizes.max_rows)
        self._buffers = StepBuffers(sizes.max_tokens, sizes.max_rows, device)
        self._tables = DeviceTables(sizes.max_table_rows, sizes.max_blocks_per_row, device)
        self._static = self._tables.values()

    @property
    def table_bytes(self) -> int:
        """Size of the step's inputs and of the tables that stay on the device."""
        return self._buffers.num_bytes + sum(tensor.nbytes for tensor in self._tables.values().values())

    def attach(self, cache: KVCache) -> None:
        """Use this KV cache from now on."""
        for layer, (key_cache, value_cache) in enumerate(zip(cache.keys, cache.values, strict=True)):
            self._static[f"key_cache.{layer}"] = key_cache
            self._static[f"value_cache.{layer}"] = value_cache

    def bucket_for(self, num_tokens: int, num_samples: int) -> Bucket:
        tokens = bucket_of(num_tokens, self.token_sizes)
        return Bucket(tokens, min(tokens, self.sizes.max_rows), bucket_of(max(num_samples, 1), self.sample_sizes))

    @torch.no_grad()
    def run(self, plan: BatchPlan) -> StepResult:
        """Run one step to its end."""
        num_samples = int(np.count_nonzero(plan.samples))
        (sampled_S,) = self.compiled.run(self._inputs(plan, self.bucket_for(plan.num_tokens, num_samples)))
        sampled = np.zeros(plan.num_rows, dtype=np.int32)
        sampled[plan.samples] = sampled_S[:num_samples].cpu().numpy()
        return StepResult(plan.step, sampled)

    def warm(self, plan: BatchPlan, bucket: Bucket) -> None:
        """Run every region once on this plan and bucket (see CompiledModel.warm)."""
        self.compiled.warm(self._inputs(plan, bucket))

    def _inputs(self, plan: BatchPlan, bucket: Bucket) -> dict[str, torch.Tensor]:
        self._tables.apply(plan.table, plan.settings)
        return {**self._static, **self._buffers.fill(plan, bucket)}
