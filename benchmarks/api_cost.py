"""What the API process costs: its CPU time per streamed token, with many streams at once and an engine that costs nothing.

    python benchmarks/api_cost.py --streams 64 --rate 1500

The server runs as `toka` runs it, in a process of its own, with the tests' fake engine, which gives every stream a token at each
step. The clients read raw sockets in this process. Goal: 15 % of one core at 64 streams and 1,500 tokens/s.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))

import psutil
from byte_tokenizer import save_byte_tokenizer
from report import publish
from served_process import Served

GOAL_RATE, GOAL_SHARE = 1500.0, 0.15
_MAX_TOKENS = 1900  # what the fake engine gives a stream
_PROMPT = "The quick brown fox jumps over the lazy dog. "
_SETTLE_S = 2.0

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": _PROMPT}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": _PROMPT}]}),
    "completions_usage": ("/v1/completions", {"prompt": _PROMPT, "stream_options": {"include_usage": True}}),
    "completions_stop": ("/v1/completions", {"prompt": _PROMPT, "stop": ["never", "\n\n"]}),
    "chat_logprobs": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": _PROMPT}], "logprobs": True, "top_logprobs": 5},
    ),
}


class Streams:
    """Open streams and what has come of them. num_chunks: events so far, one a token."""

    def __init__(self, port: int, path: str, fields: dict[str, Any], count: int):
        self.num_chunks = 0
        self._selector = selectors.DefaultSelector()
        body = json.dumps({"max_tokens": _MAX_TOKENS, "stream": True, **fields}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.sendall(head.encode() + body)
            self._selector.register(connection, selectors.EVENT_READ)

    def read_for(self, seconds: float) -> None:
        """Take in what comes."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            for key, _ in self._selector.select(left):
                self.num_chunks += key.fileobj.recv(65536).count(b"data: {")  # type: ignore[union-attr]

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


def measure(served: Served, kind: str, num_streams: int, seconds: float) -> dict[str, float]:
    """CPU of the API process while so many streams of this kind run."""
    path, fields = REQUESTS[kind]
    streams = Streams(int(served.url.rpartition(":")[2]), path, fields, num_streams)
    streams.read_for(_SETTLE_S)
    process = psutil.Process(served.process.pid)
    before, began, chunks = process.cpu_times(), time.perf_counter(), streams.num_chunks
    streams.read_for(seconds)
    after, elapsed = process.cpu_times(), time.perf_counter() - began
    num_tokens = streams.num_chunks - chunks
    streams.close()
    cpu_s = (after.user + after.system) - (before.user + before.system)
    return {
        "tokens_per_s": round(num_tokens / elapsed, 1),
        "share_of_a_core": round(cpu_s / elapsed, 4),
        "cpu_us_per_token": round(1e6 * cpu_s / num_tokens, 1),
        f"share_at_{GOAL_RATE:.0f}_tokens_per_s": round(GOAL_RATE * cpu_s / num_tokens, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--rate", type=float, default=GOAL_RATE, help="tokens/s of all streams together that the engine aims at"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--kinds", nargs="+", choices=list(REQUESTS), default=list(REQUESTS))
    parser.add_argument("--json", type=Path, help="file for the report")
    options = parser.parse_args()
    report: dict[str, Any] = {"streams": options.streams, "goal": GOAL_SHARE}
    with tempfile.TemporaryDirectory() as directory:
        model = save_byte_tokenizer(Path(directory))
        (model / "config.json").write_text('{"eos_token_id": 257}')
        (model / "model.safetensors").write_bytes(b"")
        served = Served(model, {"step_s": options.streams / options.rate}, {"stats_report_seconds": 0.0})
        try:
            served.until_status("/ready", 200)
            for kind in options.kinds:
                report[kind] = measure(served, kind, options.streams, options.seconds)
                print(f"{kind}: {report[kind]}", file=sys.stderr)
        finally:
            served.process.terminate()
            served.ends()
    publish(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
