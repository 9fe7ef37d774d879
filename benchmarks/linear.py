"""How near does the packed linear product come to the machine's limits, and how does it compare with torch's (MKL, oneDNN)?

    python benchmarks/linear.py [--quick] [--threads N] [--repeats N] [--dtype float32] [--json FILE]

Both products run in turn in one process over the same weights, so many copies of them that no cache holds them from one pass to the
next, as in a model whose layers follow one another. A figure is the median of the repeats, the ratio the median of the ratios of
neighbouring passes (above 1: toka is faster). GB/s counts the weights only. The last line of output is the JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from report import publish
from torch import Tensor

from toka.config import Config, find_cxx
from toka.kernels.cpp.build import build, load

# (out features, in features): SmolLM2-135M's qkv, output, gate and up, down, head; then Llama-3.2-1B's.
SMALL_SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]
LARGE_SHAPES = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)]
NUM_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
COLD_BYTES = 160 * 1024 * 1024  # of distinct weights; several times what the last-level cache gives us
PASS_FLOP = 8e9  # of work in a pass at most, one product at least


def seconds_per_product(products: list[Callable[[], Tensor]]) -> float:
    start = time.perf_counter()
    for product in products:
        product()
    return (time.perf_counter() - start) / len(products)


def measure(shape: tuple[int, int], rows: list[int], dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    out_features, in_features = shape
    weight_bytes = out_features * in_features * dtype.itemsize
    num_copies = max(2, -(-COLD_BYTES // weight_bytes)) if weight_bytes < COLD_BYTES else 1
    weights = [torch.randn(shape).mul_(in_features**-0.5).to(dtype) for _ in range(num_copies)]
    packed = [torch.ops.toka_cpp.pack_linear(weight) for weight in weights]
    linear_packed = torch.ops.toka_cpp.linear_packed.default
    results: list[dict[str, object]] = []
    for num_rows in rows:
        x_NI = torch.randn(num_rows, in_features).to(dtype)
        flop = 2.0 * num_rows * out_features * in_features
        per_pass = min(num_copies, max(1, int(PASS_FLOP / flop)))
        torch_s, toka_s = [], []
        for i in range(repeats + 1):
            chosen = [(i * per_pass + j) % num_copies for j in range(per_pass)]
            torch_s.append(seconds_per_product([partial(F.linear, x_NI, weights[c]) for c in chosen]))
            toka_s.append(
                seconds_per_product([partial(linear_packed, x_NI, packed[c], None, out_features) for c in chosen])
            )
        torch_s, toka_s = torch_s[1:], toka_s[1:]  # the first pass fills thread pools and scratch memory
        results.append(
            {
                "shape": shape,
                "num_rows": num_rows,
                "toka_us": median(toka_s) * 1e6,
                "toka_gflop_per_s": flop / median(toka_s) / 1e9,
                "toka_gb_per_s": weight_bytes / median(toka_s) / 1e9,
                "torch_gflop_per_s": flop / median(torch_s) / 1e9,
                "torch_gb_per_s": weight_bytes / median(torch_s) / 1e9,
                "ratio": median(theirs / ours for theirs, ours in zip(torch_s, toka_s, strict=True)),
                "best_toka_gflop_per_s": flop / min(toka_s) / 1e9,
                "best_torch_gflop_per_s": flop / min(torch_s) / 1e9,
            }
        )
    return results


def measure_limits(repeats: int) -> dict[str, float]:
    """Read bandwidth by summing an array that no cache holds, products by a large matmul of torch's."""
    array, square = torch.ones(64 * 1024 * 1024), torch.randn(1536, 1536)
    read_s = min(seconds_per_product([array.sum]) for _ in range(repeats))
    matmul_s = min(seconds_per_product([lambda: square @ square]) for _ in range(repeats))
    return {"read_gb_per_s": array.nbytes / read_s / 1e9, "matmul_gflop_per_s": 2 * 1536**3 / matmul_s / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, few rows, few repeats")
    parser.add_argument("--large", action="store_true", help="also the shapes of Llama-3.2-1B (2 GB of memory)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load(build(Config().cache_path(), find_cxx(), on_progress=print))

    shapes, rows, repeats = SMALL_SHAPES + (LARGE_SHAPES if options.large else []), NUM_ROWS, options.repeats
    if options.quick:
        shapes, rows, repeats = SMALL_SHAPES[:2], [1, 16, 64], 3
    limits = measure_limits(repeats)
    print(
        "limits: {read_gb_per_s:.1f} GB/s read, {matmul_gflop_per_s:.0f} GFLOP/s large matmul of torch".format(**limits)
    )
    print(f"{'shape':>14}{'rows':>6}{'toka GFLOP/s':>14}{'GB/s':>7}{'torch GFLOP/s':>15}{'GB/s':>7}{'ratio':>7}")
    results: list[dict[str, object]] = []
    for shape in shapes:
        for r in measure(shape, rows, getattr(torch, options.dtype), repeats):
            print(
                f"{'x'.join(map(str, shape)):>14}{r['num_rows']:6}{r['toka_gflop_per_s']:14.1f}{r['toka_gb_per_s']:7.1f}"
                f"{r['torch_gflop_per_s']:15.1f}{r['torch_gb_per_s']:7.1f}{r['ratio']:7.2f}",
                flush=True,
            )
            results.append(r)
    report = {"threads": options.threads, "dtype": options.dtype, "limits": limits, "results": results}
    publish(report, options.json)


if __name__ == "__main__":
    main()
