"""What rounding costs: perplexity on GSM8K questions and answers, and agreement of greedy texts with float32, format by format.

    python benchmarks/quantised_quality.py [--texts 120] [--json FILE]

Perplexity is that of the test rows' text, every token but the first of each row. Agreement: share of 64 greedy tokens behind each of 32
questions before the first that differs from float32's. The last line is the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from report import publish
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
GSM8K = HERE.parents[1] / "shared" / "data" / "gsm8k" / "test_first660.jsonl"
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"quantize": "none"},
    "as stored": {"quantize": "auto"},
    "as stored, float activations": {"quantize": "auto", "int8_activations": False},
    **{
        name: {"quantize": name, "quantize_lm_head": True}
        for name in (
            "int8_channel",
            "int8_channel_dynamic",
            "gguf_q8_0",
            "int4_group32",
            "int4_group128",
            "gguf_q4_0",
            "gguf_q4_1",
        )
    },
}


def measure(flags: dict[str, Any], texts: list[str], questions: list[str]) -> tuple[float, list[list[int]], float]:
    """Perplexity, greedy tokens, and the weights' size in bytes."""
    from toka import LLM, SamplingParams

    with LLM(quiet=True, **flags) as llm:
        scored = llm.generate(texts, SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
        logprobs = [score.logprob for output in scored for score in output.prompt_logprobs or () if score is not None]
        greedy = llm.generate(
            questions, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True), use_tqdm=False
        )
        tokens = [list(output.completions[0].token_ids) for output in greedy]
        return math.exp(-sum(logprobs) / len(logprobs)), tokens, llm.report["memory"]["weights"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=120, help="rows for the perplexity")
    parser.add_argument("--formats", help="names of formats, with commas between them; all if left out")
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows[: arguments.texts]]
    questions = [row["question"] for row in rows[-32:]]
    names = arguments.formats.split(",") if arguments.formats else list(FORMATS)
    found: dict[str, dict[str, float]] = {}
    reference: tuple[float, list[list[int]]] | None = None
    for name in names:
        perplexity, tokens, weight_bytes = measure(FORMATS[name], texts, questions)
        reference = reference or (perplexity, tokens)
        agreement = sum(_common_prefix(one, other) for one, other in zip(tokens, reference[1], strict=True))
        found[name] = {
            "perplexity": perplexity,
            "increase": perplexity / reference[0] - 1,
            "greedy_agreement": agreement / sum(map(len, tokens)),
            "weight_bytes": weight_bytes,
        }
        print(name, found[name], flush=True)
    table = Table("format", "perplexity", "increase", "greedy agreement", "weights MB")
    for name, row in found.items():
        table.add_row(
            name, f"{row['perplexity']:.4f}", f"{row['increase']:+.2%}", f"{row['greedy_agreement']:.0%}",
            f"{row['weight_bytes'] / 1e6:.0f}",
        )  # fmt: skip
    Console(stderr=True).print(table)
    publish({"formats": found}, arguments.json)


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    main()
