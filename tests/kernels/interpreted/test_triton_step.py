"""A model's steps on the Triton kernels that the registry chooses where Triton interprets, against the same steps on the references.

Legend: T tokens, R rows, E hidden size, H heads, D head dim, F = D / 2, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from toka.kernels.registry import Trait, choose

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE, VOCAB_SIZE = 4, 2, 32, 48, 83
BLOCK_SIZE, BLOCKS_PER_ROW, MAX_ROWS = 8, 3, 4
OPS = ("linear", "rope_write_kv", "paged_attention", "sample")


def kernels(families: Collection[str]) -> dict[str, Callable[..., Tensor]]:
    """What a CPU step with batch_invariant=T calls, if it may call these families."""
    return {
        op: choose(
            op, "cpu", torch.float32, families=families, head_dim=HEAD_DIM, traits=[Trait.BATCH_INVARIANT]
        ).overload
        for op in OPS
    }


class Engine:
    """One layer without norms, over a paged cache, with all that lives on the device."""

    def __init__(self, families: Collection[str]) -> None:
        self.kernels = kernels(families)
        random = torch.Generator().manual_seed(0)
        self.embedding_VE = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=random)
        num_heads = NUM_HEADS + 2 * NUM_KV_HEADS
        self.qkv_weight = torch.randn(num_heads * HEAD_DIM, HIDDEN_SIZE, generator=random) * 0.2
        self.head_weight = torch.randn(VOCAB_SIZE, NUM_HEADS * HEAD_DIM, generator=random) * 0.5
        self.key_cache = torch.zeros(MAX_ROWS * BLOCKS_PER_ROW, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.value_cache = torch.zeros_like(self.key_cache)
        blocks = torch.randperm(MAX_ROWS * BLOCKS_PER_ROW, generator=random, dtype=torch.int32)
        self.block_table = blocks.view(MAX_ROWS, BLOCKS_PER_ROW)
        self.last_token = torch.full((MAX_ROWS,), -7, dtype=torch.int32)
        self.settings = (
            torch.tensor([0.0, 1.0, 0.8, 0.0]),  # temperature
            torch.tensor([0, 0, 20, 0], dtype=torch.int32),  # top_k
            torch.tensor([1.0, 1.0, 0.9, 1.0]),  # top_p
            torch.zeros(MAX_ROWS),  # min_p
            torch.arange(MAX_ROWS) * 31,  # seed
            torch.full((MAX_ROWS, 16), -1, dtype=torch.int32),
            torch.zeros(MAX_ROWS, dtype=torch.int32),
        )

    def step(self, ids_T: Tensor, rows: list[int], num_queries: list[int], seq_lens: list[int]) -> Tensor:
        """Sampled ids of the rows. The last row and the last two tokens are padding."""
        positions = [p for n, end in zip(num_queries, seq_lens, strict=True) for p in range(end - n, end)]
        owners = [row for row, n in zip(rows, num_queries, strict=True) for _ in range(n)]
        slots = [
            int(self.block_table[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
            for row, p in zip(owners, positions, strict=True)
        ]
        rows_R = torch.tensor([*rows, -1], dtype=torch.int32)
        seq_lens_R = torch.tensor([*seq_lens, 0], dtype=torch.int32)
        query_start = torch.tensor([0, *num_queries, 0]).cumsum(0).int()
        angles_TF = torch.tensor([*positions, 0, 0])[:, None] * 10.0 ** -torch.linspace(0.0, 2.0, HEAD_DIM // 2)

        hidden_TE = self.embedding_VE[torch.cat([ids_T, torch.zeros(2, dtype=torch.int32)])]
        qkv_THD = self.kernels["linear"](hidden_TE, self.qkv_weight, None).unflatten(1, (-1, HEAD_DIM))
        query_THD, key_THD, value_THD = qkv_THD.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
        caches = (self.key_cache, self.value_cache)
        turned_THD = self.kernels["rope_write_kv"](
            query_THD,
            key_THD,
            value_THD,
            angles_TF.cos(),
            angles_TF.sin(),
            *caches,
            torch.tensor([*slots, -1, -1], dtype=torch.int32),
        )
        out_THD = self.kernels["paged_attention"](
            turned_THD, *caches, self.block_table, rows_R, query_start, seq_lens_R, HEAD_DIM**-0.5, 0
        )
        last_RE = out_THD.flatten(1)[query_start[1:] - 1]
        logits_RV = self.kernels["linear"](last_RE, self.head_weight, None)
        return self.kernels["sample"](logits_RV, rows_R, seq_lens_R, *self.settings, self.last_token)


def test_the_registry_chooses_triton_where_it_interprets() -> None:
    chosen = kernels({"reference", "torch", "triton"})
    assert {op: overload.namespace for op, overload in chosen.items()} == dict.fromkeys(OPS, "toka_triton")


def test_prefill_and_decode_like_the_references() -> None:
    """A prefill of one row beside another's, then a mixed step, then decodes fed by what was sampled."""
    engines = [Engine({"reference"}), Engine({"reference", "torch", "triton"})]
    prompt = torch.randint(0, VOCAB_SIZE, (30,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    sampled: list[list[Tensor]] = [[], []]
    for engine, ids in zip(engines, sampled, strict=True):
        ids.append(engine.step(prompt[:18], [2, 0], [11, 7], [11, 7]))
        ids.append(engine.step(torch.cat([engine.last_token[[2, 0]], prompt[18:23]]), [2, 0, 1], [1, 1, 5], [12, 8, 5]))
        for i in range(3):
            ids.append(engine.step(engine.last_token[[1, 0, 2]], [1, 0, 2], [1, 1, 1], [6 + i, 9 + i, 13 + i]))
    expected, actual = sampled
    assert [ids_R.tolist() for ids_R in actual] == [ids_R.tolist() for ids_R in expected]
    assert len({int(token) for ids_R in actual for token in ids_R[:-1]}) > 5, "the rows draw all the same"
    for name in ("key_cache", "value_cache", "last_token"):
        torch.testing.assert_close(getattr(engines[1], name), getattr(engines[0], name), rtol=1e-5, atol=1e-5)
