"""What does computing attention over shared prefixes once bring? The same run with and without it, in turn. JSON on the last line.

    python benchmarks/hydragen.py [--json FILE] [--samples 128] [--prompts 8] [--rounds 1] [--max-seqs 1024] [--model default]

Large Language Monkeys (Brown et al. 2024) on a small scale: so many samples of each of a few GSM8K 4-shot prompts, all in one batch,
temperature 0.6, stop at "Question:", at most 128 tokens. The four solved examples are common to all prompts, the rest of a prompt to
its samples. Sampled texts must be the same with and without, to the letter: toka's CPU kernels promise it. Each run has a process of
its own; figures are medians over the rounds, output tokens a second and seconds a decode step, prefill included in the former.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from report import publish

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
MAX_TOKENS = 128


def four_shot_prompts(count: int) -> list[str]:
    if not GSM8K.exists():
        raise SystemExit(f"{GSM8K} is missing: train_first200.jsonl and test_first660.jsonl of GSM8K belong there")
    solved, open_ = (
        [json.loads(line) for line in (GSM8K / name).read_text().splitlines()]
        for name in ("train_first200.jsonl", "test_first660.jsonl")
    )
    examples = "".join(f"Question: {each['question']}\nAnswer: {each['answer']}\n\n" for each in solved[:4])
    return [f"{examples}Question: {each['question']}\nAnswer:" for each in open_[:count]]


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    from toka import LLM, SamplingParams

    prompts = four_shot_prompts(arguments.prompts)
    num_rows = arguments.prompts * arguments.samples
    llm = LLM(
        arguments.model,
        quiet=True,
        use_hydragen=arguments.child == "with",
        max_seqs_per_forward=min(arguments.max_seqs, num_rows),
        max_tokens_per_forward=max(512, arguments.max_seqs),
        max_num_tokens_per_request=1024,
        kv_cache_num_tokens=num_rows * (MAX_TOKENS + 32) + arguments.prompts * 1024,
    )
    llm.generate(prompts[0], SamplingParams(max_tokens=2), use_tqdm=False)
    before = llm.stats()
    params = [
        SamplingParams(n=arguments.samples, max_tokens=MAX_TOKENS, temperature=0.6, seed=1000 * i, stop=("Question:",))
        for i in range(len(prompts))
    ]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    after = llm.stats()
    texts = [completion.text for output in outputs for completion in output.completions]
    num_steps = after.num_steps_total - before.num_steps_total
    return {
        "output_tps": sum(len(c.token_ids) for output in outputs for c in output.completions) / seconds,
        "seconds": seconds,
        "steps": num_steps,
        "step_s": seconds / num_steps,
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
    }


def run(kind: str) -> dict[str, Any]:
    """One run in a process of its own, with this process's options."""
    command = [sys.executable, __file__, "--child", kind, *sys.argv[1:]]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    parser.add_argument("--samples", type=int, default=128, help="of each prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-seqs", type=int, default=1024, help="rows of a step at most")
    parser.add_argument("--model", default="default")
    parser.add_argument("--child", choices=("with", "without"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    runs: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
    for index in range(arguments.rounds):
        for kind in ("with", "without") if index % 2 == 0 else ("without", "with"):
            figures = run(kind)
            runs[kind].append(figures)
            print(f"{kind:7} {figures['output_tps']:.0f} tok/s, {figures['step_s']:.3f} s a step", flush=True)
    all_runs = runs["with"] + runs["without"]
    report: dict[str, Any] = {
        kind: {
            name: statistics.median(each[name] for each in runs[kind]) for name in ("output_tps", "step_s", "seconds")
        }
        for kind in runs
    }
    report["speedup"] = report["without"]["seconds"] / report["with"]["seconds"]
    report["same_texts"] = len({each["texts"] for each in all_runs}) == 1
    report["prompt_tokens"] = all_runs[0]["prompt_tokens"]
    report |= {name: getattr(arguments, name) for name in ("samples", "prompts", "max_seqs", "rounds")}
    publish(report, arguments.json)


if __name__ == "__main__":
    main()
