"""What the drivers of all engines share. Standard library only: each driver runs in its engine's own virtual environment.

A driver is started with the model's path and a precision, loads, prints {"ready": ...}, and then answers each line
{"prompts": [[token ids]], "num_tokens": n} with {"seconds": s, "ids": [[n token ids] for each prompt]}, greedy, end tokens ignored.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """num_tokens greedy tokens behind each prompt."""
        ...


def serve(load: Callable[[str, str, int], Engine]) -> None:
    """Load the engine and answer lines until stdin ends. load: (path, precision, threads) → engine."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print goes to stderr
    path, precision, num_threads = sys.argv[1:4]
    engine = load(path, precision, int(num_threads))
    engine.generate([list(range(100, 116))], 2)
    _say(answers, {"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        ids = engine.generate(order["prompts"], order["num_tokens"])
        seconds = time.perf_counter() - began
        wrong = [len(each) for each in ids if len(each) != order["num_tokens"]]
        _say(answers, {"error": f"gave {wrong} tokens"} if wrong else {"seconds": seconds, "ids": ids})


def _say(answers: Any, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)
