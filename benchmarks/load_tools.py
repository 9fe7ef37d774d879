"""Load generators that others made, against toka serving the embedded model: do they run to the end, and what do they say? JSON last.

    python benchmarks/load_tools.py [--guidellm-python PYTHON] [--aiperf-python PYTHON] [--json FILE] [--url URL] [--requests 24]

PYTHON: interpreters of environments with guidellm 0.8.1 and aiperf 0.13.0, each of its own; what is not given is not run. guidellm drives
/v1/completions, aiperf /v1/chat/completions, both streaming, at two and at four requests at once, with prompts of their own making of
so many tokens and answers of a fixed length. Their tables are printed as they are. Status 1 if a request failed or a tool did.

url: of a server that runs already; without it one is started. Figures are the tools' own: requests done, output tokens per second, and
medians of time to first token and between tokens in ms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_checkpoint import write_hf_tokenizer
from report import publish
from startup import ready_toka

from toka.config import Config, hub_offline
from toka.model_source import ModelSource, locate

CONCURRENCY = (2, 4)
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 32


def run_guidellm(python: str, url: str, tokenizer: Path, num_requests: int) -> dict[str, dict[str, float]]:
    """Its figures by concurrency."""
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory, "results.json")
        streams = ",".join(map(str, CONCURRENCY))
        command = [python, "-m", "guidellm", "run", "--disable-console-interactive"]
        command += ["--backend", f"kind=openai_http,target={url},model=default,request_format=/v1/completions"]
        command += ["--profile", "kind=concurrent,streams=1", "--override", "profile.streams", streams]
        command += ["--constraint", f"kind=max_requests,count={num_requests}"]
        command += ["--tokenizer", f"kind=hf_auto,model={tokenizer}"]
        command += [
            "--data",
            f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        ]
        command += ["--output", "kind=console", "--output", f"kind=json,path={results}"]
        _run(command, directory, {"HF_HUB_OFFLINE": "1"})
        benchmarks = json.loads(results.read_text())["benchmarks"]
    return {
        str(concurrency): _guidellm_figures(benchmark["metrics"])
        for concurrency, benchmark in zip(CONCURRENCY, benchmarks, strict=True)
    }


def _guidellm_figures(metrics: dict[str, Any]) -> dict[str, float]:
    def of(name: str, statistic: str) -> float:
        return float(metrics[name]["successful"][statistic])

    totals = metrics["request_totals"]
    return {
        "requests": totals["successful"],
        "failed": totals["errored"] + totals["incomplete"],
        "output_tokens_per_s": of("output_tokens_per_second", "mean"),
        "ttft_ms": of("time_to_first_token_ms", "median"),
        "itl_ms": of("inter_token_latency_ms", "median"),
    }


def run_aiperf(python: str, url: str, tokenizer: Path, num_requests: int) -> dict[str, dict[str, float]]:
    """Its figures by concurrency."""
    figures = {}
    for concurrency in CONCURRENCY:
        with tempfile.TemporaryDirectory() as directory:
            command = [python, "-m", "aiperf", "profile", "--model", "default", "--url", url, "--endpoint-type", "chat"]
            command += ["--streaming", "--tokenizer", str(tokenizer), "--concurrency", str(concurrency)]
            command += ["--request-count", str(num_requests), "--synthetic-input-tokens-mean", str(PROMPT_TOKENS)]
            command += ["--output-tokens-mean", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"]
            command += [
                "--extra-inputs",
                f"min_tokens:{OUTPUT_TOKENS}",
                "--use-server-token-count",
                "--random-seed",
                "0",
            ]
            _run([*command, "--ui", "none", "--artifact-dir", directory], directory, {})
            [results] = Path(directory).rglob("profile_export_aiperf.json")
            figures[str(concurrency)] = _aiperf_figures(json.loads(results.read_text()), num_requests)
    return figures


def _aiperf_figures(metrics: dict[str, Any], num_requests: int) -> dict[str, float]:
    done = int(metrics["request_count"]["avg"])
    return {
        "requests": done,
        "failed": num_requests - done,
        "output_tokens_per_s": metrics["output_token_throughput"]["avg"],
        "ttft_ms": metrics["time_to_first_token"]["p50"],
        "itl_ms": metrics["inter_token_latency"]["p50"],
    }


def _run(command: list[str], directory: str, environment: dict[str, str]) -> None:
    """Run a tool to its end in a directory of its own; what it prints is seen."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    status = subprocess.run(command, cwd=directory, env=inherited | environment, check=False).returncode
    if status:
        raise SystemExit(f"{' '.join(command[:4])} ended with status {status}")


TOOLS = {"guidellm": run_guidellm, "aiperf": run_aiperf}


@contextmanager
def _server(url: str | None, source: ModelSource, cache: Path) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with ready_toka(source, cache) as (_, port):
        yield f"http://127.0.0.1:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm-python", help="interpreter of an environment with guidellm 0.8.1")
    parser.add_argument("--aiperf-python", help="interpreter of an environment with aiperf 0.13.0")
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--model", default="default")
    parser.add_argument("--requests", type=int, default=24, help="at each concurrency")
    arguments = parser.parse_args()
    pythons = {name: getattr(arguments, f"{name}_python") for name in TOOLS}
    if not any(pythons.values()):
        parser.error("name at least one tool's interpreter")
    cache = Config().cache_path()
    source = locate(arguments.model, None, cache, offline=hub_offline())
    report: dict[str, Any] = {"model": source.name, "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    with tempfile.TemporaryDirectory() as tokenizer, _server(arguments.url, source, cache) as url:
        write_hf_tokenizer(source, Path(tokenizer))
        for name, python in pythons.items():
            if python is not None:
                report[name] = TOOLS[name](python, url, Path(tokenizer), arguments.requests)
    publish(report, arguments.json)
    if any(figures["failed"] for name in TOOLS for figures in report.get(name, {}).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
