"""How near does paged attention come to the machine's limits? Decode against read bandwidth, prefill against matrix products; and
what decode gains where rows share a prefix.

    python benchmarks/attention.py [--threads N] [--repeats N] [--json FILE]

Limits are measured in the same run: bandwidth by summing an array that no cache holds, products by a large float32 matmul. Each
figure is the best of the repeats. The last line of output is the JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import publish
from torch import Tensor

from toka.config import Config, find_cxx
from toka.kernels.cpp.build import build, load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (query heads, KV heads, head dim) of SmolLM2-135M, Llama-3-8B, and a model without grouped heads
HEADS = [(9, 3, 64), (32, 8, 128), (8, 8, 64)]
DECODE = [(1, 4096), (64, 256), (32, 2048)]  # (rows, tokens in each row's cache)
PREFILL = [(512, 512), (2048, 2048), (512, 4096)]  # (new tokens, tokens in the cache after them)
SHARED = [
    (1024, 8, 640, 64),
    (128, 1, 640, 64),
    (32, 1, 512, 32),
    (8, 1, 512, 32),
]  # (rows, groups, prefix, tokens of its own)
BLOCK_SIZE = 16


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def step(heads: tuple[int, int, int], num_queries: int, rows: int, seq_len: int, dtype: torch.dtype) -> tuple:
    """Arguments of paged_attention for `rows` equal rows over scattered blocks."""
    num_heads, num_kv_heads, head_dim = heads
    blocks_per_row = -(-seq_len // BLOCK_SIZE)
    num_blocks = rows * blocks_per_row
    cache_shape = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    block_table = torch.randperm(num_blocks, dtype=torch.int32).view(rows, blocks_per_row)
    return (
        torch.randn(rows * num_queries, num_heads, head_dim, dtype=dtype),
        torch.randn(cache_shape, dtype=dtype),
        torch.randn(cache_shape, dtype=dtype),
        block_table,
        torch.arange(rows, dtype=torch.int32),
        torch.arange(rows + 1, dtype=torch.int32) * num_queries,
        torch.full((rows,), seq_len, dtype=torch.int32),
        head_dim**-0.5,
        0,
    )


def measure_limits(repeats: int) -> dict[str, float]:
    array: Tensor = torch.ones(64 * 1024 * 1024)
    square = torch.randn(1536, 1536)
    return {
        "read_gb_per_s": array.nbytes / best_seconds(array.sum, repeats) / 1e9,
        "matmul_gflop_per_s": 2 * 1536**3 / best_seconds(lambda: square @ square, repeats) / 1e9,
    }


def measure_decode(limits: dict[str, float], repeats: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for name, dtype in DTYPES.items():
        for heads in HEADS:
            for rows, seq_len in DECODE:
                arguments = step(heads, 1, rows, seq_len, dtype)
                seconds = best_seconds(lambda a=arguments: torch.ops.toka_cpp.paged_attention(*a), repeats)
                rate = 2 * rows * seq_len * heads[1] * heads[2] * dtype.itemsize / seconds / 1e9
                results.append(
                    {
                        "dtype": name,
                        "heads": heads,
                        "rows": rows,
                        "seq_len": seq_len,
                        "us": seconds * 1e6,
                        "gb_per_s": rate,
                        "share": rate / limits["read_gb_per_s"],
                    }
                )
    return results


def measure_prefill(limits: dict[str, float], repeats: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for name, dtype in DTYPES.items():
        for heads in HEADS:
            for num_queries, seq_len in PREFILL:
                arguments = step(heads, num_queries, 1, seq_len, dtype)
                seconds = best_seconds(lambda a=arguments: torch.ops.toka_cpp.paged_attention(*a), repeats)
                seen = num_queries * (seq_len - num_queries) + num_queries * (num_queries + 1) / 2
                rate = 4 * heads[0] * heads[2] * seen / seconds / 1e9
                results.append(
                    {
                        "dtype": name,
                        "heads": heads,
                        "num_queries": num_queries,
                        "seq_len": seq_len,
                        "us": seconds * 1e6,
                        "gflop_per_s": rate,
                        "share": rate / limits["matmul_gflop_per_s"],
                    }
                )
    return results


def measure_shared(limits: dict[str, float], repeats: int) -> list[dict[str, object]]:
    """Decode rows of SmolLM2-135M after a prefix that each group shares, with the groups named and without, in turn."""
    results: list[dict[str, object]] = []
    num_heads, _, head_dim = HEADS[0]
    op = torch.ops.toka_cpp.paged_attention
    for rows, num_groups, prefix, own in SHARED:
        arguments = step(HEADS[0], 1, rows, prefix + own, torch.float32)
        table, size = arguments[3], rows // num_groups
        table[:, : prefix // BLOCK_SIZE] = table[::size, : prefix // BLOCK_SIZE].repeat_interleave(size, 0)
        groups = torch.tensor([[0, i * size, (i + 1) * size, 0, prefix] for i in range(num_groups)], dtype=torch.int32)
        shared = (groups, torch.arange(rows, dtype=torch.int32), torch.full((rows,), prefix, dtype=torch.int32))
        assert torch.equal(op(*arguments), op(*arguments, *shared))
        plain = best_seconds(lambda a=arguments: op(*a), repeats)
        seconds = best_seconds(lambda a=(*arguments, *shared): op(*a), repeats)
        rate = 4 * num_heads * head_dim * rows * (prefix + own) / seconds / 1e9
        results.append(
            {
                "rows": rows,
                "groups": num_groups,
                "prefix": prefix,
                "own": own,
                "plain_us": round(plain * 1e6),
                "us": seconds * 1e6,
                "gflop_per_s": rate,
                "share": rate / limits["matmul_gflop_per_s"],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load(build(Config().cache_path(), find_cxx(), on_progress=print))

    limits = measure_limits(options.repeats)
    report = {
        "threads": options.threads,
        "limits": limits,
        "decode": measure_decode(limits, options.repeats),
        "prefill": measure_prefill(limits, options.repeats),
        "shared": measure_shared(limits, options.repeats),
    }
    print(f"limits: {limits['read_gb_per_s']:.1f} GB/s read, {limits['matmul_gflop_per_s']:.0f} GFLOP/s matmul")
    for kind, unit in (("decode", "gb_per_s"), ("prefill", "gflop_per_s"), ("shared", "gflop_per_s")):
        for result in report[kind]:
            shape = " ".join(f"{key}={value}" for key, value in result.items() if key not in ("us", unit, "share"))
            print(
                f"{kind:8}{shape:66}{result['us']:10.0f} us{result[unit]:8.1f} {unit}{result['share']:7.0%} of the limit"
            )
    publish(report, options.json)


if __name__ == "__main__":
    main()
