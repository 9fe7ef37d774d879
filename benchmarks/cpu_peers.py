"""How fast is toka on this CPU beside its peers, in every precision, on the same prompts, in turn? A table, then JSON on the last line.

    python benchmarks/cpu_peers.py --venvs DIR [--engines toka,llama.cpp] [--precisions int4,int8] [--rounds 3] [--json FILE]

W1: one stream, 128 tokens in, 128 out: decode tokens/s and the time to the first token. W2: 64 requests, 128 in, 128 out. W3: 32
requests with a shared prefix of 512 tokens and 32 of their own, 64 out, empty prefix cache. W2 and W3: output tokens/s, prefill
included. Greedy, end tokens ignored, prompts cut from GSM8K questions, the same for all engines, others in each round; figures are
medians of the rounds.

Each engine has a process of its own (peers/), in its own virtual environment DIR/<engine>, and sleeps while others are measured. A run
counts only if nothing else used the cores meanwhile; else it is tried again, and what never ran undisturbed is marked. The greedy
tokens of the first round are compared with float32's: some engines are fast since they round the weights once more.

Limits that shares refer to: a decode step reads all weights once (DRAM); prefill is bound by products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_checkpoint import write_hf_checkpoint
from report import publish
from rich.console import Console
from rich.table import Table
from throughput import Prompts

from toka.config import Config, hub_offline, num_available_cores
from toka.model_source import locate, read_hf_config
from toka.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
DRAM_BYTES_PER_S = 21e9  # of this machine, two threads
MAX_OTHERS = 0.05  # share of all cores that others may use in a run that counts
MAX_TRIES = 3
PRECISIONS = ("int4", "int8", "float16", "float32")
WEIGHT_BYTES = {
    "int4": 96.6e6,
    "int8": 134.5e6,
    "float16": 269e6,
    "float32": 538e6,
}  # of SmolLM2-135M, read in every decode step


@dataclass(frozen=True)
class Peer:
    """driver: file in peers/. model: which file it is given, "gguf" or "hf". precisions: ours → the engine's own word."""

    driver: str
    model: str
    precisions: dict[str, str]


PEERS = {
    "toka": Peer("toka_engine.py", "gguf", {each: each for each in PRECISIONS}),
    "llama.cpp": Peer(
        "llama_cpp_engine.py", "gguf", {"int4": "Q4_1", "int8": "Q8_0", "float16": "F16", "float32": "F32"}
    ),
    "openvino": Peer("openvino_engine.py", "gguf", {"int4": "Q4_1", "int8": "Q8_0", "float16": "F16"}),
    "vllm": Peer("vllm_engine.py", "hf", {"float16": "bfloat16", "float32": "float32"}),
    "transformers": Peer("transformers_engine.py", "hf", {"float16": "bfloat16", "float32": "float32"}),
}


class Process:
    """One engine at work in one precision."""

    def __init__(self, python: Path, peer: Peer, model: Path, precision: str):
        command = [str(python), str(HERE / "peers" / peer.driver), str(model), precision, str(num_available_cores())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "num_tokens": num_tokens}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def undisturbed(self, prompts: list[list[int]], num_tokens: int) -> tuple[dict[str, Any], bool]:
        """The answer of a run during which nobody else used the cores, and whether there was one."""
        for _ in range(MAX_TRIES):
            busy, own, began = _busy_s(), self._cpu_s(), time.perf_counter()
            answer = self.generate(prompts, num_tokens)
            wall = time.perf_counter() - began
            others = (_busy_s() - busy) - (self._cpu_s() - own)
            if others <= MAX_OTHERS * wall * num_available_cores():
                return answer, True
        return answer, False

    def _cpu_s(self) -> float:
        """CPU seconds of the process and all below it."""
        return sum(_cpu_s(pid) for pid in [self._process.pid, *_descendants(self._process.pid)])

    def resident_bytes(self) -> int:
        return sum(_resident_bytes(pid) for pid in [self._process.pid, *_descendants(self._process.pid)])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


_TICKS = 100.0


def _busy_s() -> float:
    """CPU seconds that all processes have used since boot."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *_descendants(child))]


@dataclass
class Figures:
    """One engine in one precision. values: workload → the rounds' figures. calm: whether every run was undisturbed."""

    values: dict[str, list[float]] = field(default_factory=dict)
    calm: bool = True
    ids: list[int] = field(default_factory=list)
    resident_bytes: int = 0

    def add(self, workload: str, value: float, calm: bool) -> None:
        self.values.setdefault(workload, []).append(value)
        self.calm &= calm


def measure(process: Process, figures: Figures, prompts: Prompts) -> None:
    """One round of all workloads."""
    first, calm = process.undisturbed([prompts.take(128)], 1)
    figures.add("W1-ttft", first["seconds"], calm)
    whole, calm = process.undisturbed([prompts.take(128)], 128)
    figures.add("W1-decode", 127 / (whole["seconds"] - figures.values["W1-ttft"][-1]), calm)
    figures.ids = figures.ids or whole["ids"][0]
    figures.resident_bytes = process.resident_bytes()
    many, calm = process.undisturbed([prompts.take(128) for _ in range(64)], 128)
    figures.add("W2", 64 * 128 / many["seconds"], calm)
    prefix = prompts.take(512)
    # A prefix is new in each try, or it would be cached.
    shared = process.generate([prefix + prompts.take(32) for _ in range(32)], 64)
    figures.add("W3", 32 * 64 / shared["seconds"], True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, help="folder with one virtual environment for each peer")
    parser.add_argument("--ggufs", type=Path, help="folder with Q4_1.gguf, Q8_0.gguf, F16.gguf, F32.gguf of the model")
    parser.add_argument("--engines", default="toka,transformers")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    source = locate("default", None, Config().cache_path(), offline=hub_offline())
    tokenizer = Tokenizer.load(source.tokenizer_path, read_hf_config(source)["eos_token_id"])
    found: dict[tuple[str, str], Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        hf = Path(folder)
        if any(PEERS[engine].model == "hf" for engine in arguments.engines.split(",")):
            write_hf_checkpoint(source, hf)
        for precision in arguments.precisions.split(","):
            processes = {}
            for engine in arguments.engines.split(","):
                peer = PEERS[engine]
                if precision not in peer.precisions:
                    continue
                word = peer.precisions[precision]
                model = hf if peer.model == "hf" else source.path
                if engine != "toka" and peer.model == "gguf" and arguments.ggufs is not None:
                    model = arguments.ggufs / f"{word}.gguf"
                python = _python(arguments.venvs, engine)
                processes[engine] = Process(python, peer, model, word)
            for _ in range(arguments.rounds):
                for engine, process in processes.items():
                    # The same prompts for all engines, others in each round.
                    figures = found.setdefault((engine, precision), Figures())
                    prompts = Prompts(tokenizer)
                    prompts.take(1 + 5003 * len(figures.values.get("W2", [])))
                    measure(process, figures, prompts)
                    print(
                        engine,
                        precision,
                        {key: round(values[-1], 3) for key, values in figures.values.items()},
                        flush=True,
                    )
            for process in processes.values():
                process.close()
    publish({"rows": _rows(found)}, arguments.json)


def _python(venvs: Path | None, engine: str) -> Path:
    own = None if venvs is None else venvs / engine / "bin" / "python"
    return own if own is not None and own.exists() else Path(sys.executable)


def _rows(found: dict[tuple[str, str], Figures]) -> list[dict[str, Any]]:
    rows = []
    table = Table("workload", "precision", "engine", "figure", "toka's ratio", "resident MB", "calm")
    for workload in ("W1-ttft", "W1-decode", "W2", "W3"):
        for (engine, precision), figures in found.items():
            value = statistics.median(figures.values[workload])
            reference = found.get(("toka", precision))
            ratio = None
            if reference is not None:
                ours = statistics.median(reference.values[workload])
                ratio = value / ours if workload == "W1-ttft" else ours / value
            name = "ttft_s" if workload == "W1-ttft" else "tps"
            share = value * WEIGHT_BYTES[precision] / DRAM_BYTES_PER_S if workload == "W1-decode" else None
            same = _common_prefix(figures.ids, found.get(("toka", "float32"), figures).ids)
            rows.append(
                {
                    "workload": workload,
                    "precision": precision,
                    "engine": engine,
                    name: value,
                    "share_of_limit": share,
                    "toka_ratio": ratio,
                    "same_greedy_tokens_as_float32": same,
                    "resident_bytes": figures.resident_bytes,
                    "undisturbed": figures.calm,
                }
            )
            table.add_row(
                workload, precision, engine, f"{value:.3g}", "-" if ratio is None else f"{ratio:.2f}",
                f"{figures.resident_bytes / 1e6:.0f}", "yes" if figures.calm else "no",
            )  # fmt: skip
    Console(stderr=True).print(table)
    return rows


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    main()
