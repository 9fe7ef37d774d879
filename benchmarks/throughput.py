"""How fast is toka beside transformers `generate` on this machine, on the same prompts, in turn? JSON on the last line.

    python benchmarks/throughput.py [--json FILE] [--rounds 2] [--model default] [--engines toka,transformers]

W1: one stream, 128 tokens in, 128 out: decode tokens/s, and time to the first token. W2: 64 requests, 128 in, 128 out: output tokens/s,
prefill included. W3: 32 requests that share a 512-token prefix, 32 tokens of their own, 64 out, empty prefix cache: output tokens/s.
Greedy, end tokens ignored, prompts cut from GSM8K questions and different in every round. Figures are medians over the rounds. Each engine
lives in a process of its own that sleeps while the other is measured; toka runs as the library (`LLM.generate`), transformers with its
default attention and a static batch, which suits it. Startup is that of the server, from exec to /ready, once with an empty cache
directory (the model file is there already), once warm.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import publish
from startup import ready_toka

from toka.config import Config, hub_offline, num_available_cores
from toka.model_source import ModelSource, locate, read_hf_config
from toka.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
GSM8K = HERE.parents[1] / "shared" / "data" / "gsm8k" / "test_first660.jsonl"


class Prompts:
    """Token prompts cut from one long real text; none is given out twice until the text is used up."""

    def __init__(self, tokenizer: Tokenizer):
        texts = (
            [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
            if GSM8K.exists()
            else _own_texts()
        )
        self._tokens = tokenizer.encode("\n\n".join(texts))
        self._next = 0

    def take(self, num_tokens: int) -> list[int]:
        if self._next + num_tokens > len(self._tokens):
            self._next = self._next % 97 + 1  # round again, from another place
        self._next += num_tokens
        return self._tokens[self._next - num_tokens : self._next]


def _own_texts() -> list[str]:
    return [
        f"Tom has {n} boxes with {n * n % 31} pens each and gives away {n % 7}. How many pens are left to him?"
        for n in range(3, 2000)
    ]


class Toka:
    def __init__(self, source: ModelSource):
        from toka import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(str(source.path), tokenizer=str(source.tokenizer_path), quiet=True)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> None:
        params = self._params(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.completions[0].token_ids) == num_tokens for output in outputs)


class Transformers:
    def __init__(self, source: ModelSource):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_available_cores())
        self._torch = torch
        where = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
        folder = source.path.parent if source.kind == "gguf" else source.path
        self._model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **where).eval()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> None:
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert output.shape == (len(prompts), len(prompts[0]) + num_tokens)


ENGINES: dict[str, Callable[[ModelSource], Any]] = {"toka": Toka, "transformers": Transformers}


def measure(engine: Any, workload: str, prompts: Prompts) -> dict[str, float]:
    """One run of one workload; its figures by their names in the JSON."""
    if workload == "w1":
        first_s = _seconds(engine, [prompts.take(128)], 1)
        whole_s = _seconds(engine, [prompts.take(128)], 128)
        return {"w1_decode_tps": 127 / (whole_s - first_s), "w1_ttft_s": first_s}
    if workload == "w2":
        return {"w2_output_tps": 64 * 128 / _seconds(engine, [prompts.take(128) for _ in range(64)], 128)}
    prefix = prompts.take(512)
    return {"w3_output_tps": 32 * 64 / _seconds(engine, [prefix + prompts.take(32) for _ in range(32)], 64)}


def _seconds(engine: Any, prompts: list[list[int]], num_tokens: int) -> float:
    began = time.perf_counter()
    engine.generate(prompts, num_tokens)
    return time.perf_counter() - began


def child(name: str, model: str) -> None:
    """Answer workload names on stdin with JSON lines on stdout."""
    source = locate(model, None, Config().cache_path(), offline=hub_offline())
    prompts = Prompts(Tokenizer.load(source.tokenizer_path, read_hf_config(source)["eos_token_id"]))
    engine = ENGINES[name](source)
    engine.generate([prompts.take(32)], 4)
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        figures = measure(engine, line.strip(), prompts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**figures, "peak_rss_bytes": peak}), flush=True)


class Child:
    """The parent's end of one engine's process."""

    def __init__(self, name: str, model: str):
        command = [sys.executable, __file__, "--child", name, "--model", model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def measure(self, workload: str) -> dict[str, float]:
        assert self._process.stdin is not None
        print(workload, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit(f"an engine's process ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="default")
    parser.add_argument("--engines", default="toka,transformers")
    parser.add_argument("--workloads", default="w1,w2,w3")
    parser.add_argument("--child", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.model)
        return
    source = locate(arguments.model, None, Config().cache_path(), offline=hub_offline())
    with tempfile.TemporaryDirectory() as cache:
        with ready_toka(source, Path(cache)) as (cold, _):
            pass
        with ready_toka(source, Path(cache)) as (warm, _):
            pass
    print(f"startup: cold {cold:.1f} s, warm {warm:.1f} s")
    children = {name: Child(name, arguments.model) for name in arguments.engines.split(",")}
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in children}
    for workload in arguments.workloads.split(","):
        for round_index in range(arguments.rounds if workload != "w1" else arguments.rounds + 1):
            for name, engine in children.items():
                for key, value in engine.measure(workload).items():
                    rows[name].setdefault(key, []).append(value)
            print(
                f"{workload} round {round_index}: "
                + "; ".join(_last(name, row, workload) for name, row in rows.items())
            )
    for engine in children.values():
        engine.close()
    peak = {name: row.pop("peak_rss_bytes") for name, row in rows.items()}
    report: dict[str, Any] = {
        name: {key: statistics.median(values) for key, values in row.items()} for name, row in rows.items()
    }
    report |= {"cold_start_s": cold, "warm_start_s": warm}
    if "toka" in peak:
        report["peak_rss_bytes"] = max(peak["toka"])
    publish(report, arguments.json)


def _last(name: str, row: dict[str, list[float]], workload: str) -> str:
    figures = ", ".join(f"{key} {values[-1]:.3g}" for key, values in row.items() if key.startswith(workload))
    return f"{name} {figures}"


if __name__ == "__main__":
    main()
