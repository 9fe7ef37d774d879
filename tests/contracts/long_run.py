"""Serves thousands of small requests with the real engine and prints, as one line of JSON, what the process held on the way.

Run by test_flat_memory.py in a process of its own, where no memory that other tests gave back hides what this engine takes:
    python long_run.py CHECKPOINT CACHE_DIR NUM_REQUESTS NUM_SAMPLES
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from toka.config import Config, set_engine_environment
from toka.messages import FinishReason, Submit, pack_tokens
from toka.model_source import ModelSource
from toka.params import SamplingParams

NUM_THREADS = 2
VOCAB_SIZE = 320
BLOCK_SIZE = 16
MAX_WAITING = 96  # requests that are in the engine at once, more than one step takes
# A cache of 48 blocks, fewer than a full step wants at its worst: blocks are evicted all the time, and requests wait for some.
FLAGS = {"max_tokens_per_forward": 128, "max_seqs_per_forward": 64, "kv_cache_num_tokens": 48 * BLOCK_SIZE}


@dataclass(frozen=True)
class Held:
    """By the process after so many requests, with none in the engine. objects: blocks of Python's allocator."""

    num_requests: int
    resident_bytes: int
    objects: int


class Traffic:
    """Requests of every kind that the scheduler and the sampler tell apart, from a seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._prefixes = [self._tokens(length) for length in (16, 20, 32, 35, 48) for _ in range(4)]
        self._next_id = 1

    def next(self) -> Submit:
        rng = self._random
        prefix = rng.choice(self._prefixes) if rng.random() < 0.15 else []
        n = rng.choice((1, 1, 1, 1, 1, 1, 2, 4))
        max_tokens = rng.choice((1, 1, 2, 3, 40)) if rng.random() < 0.1 else rng.randint(1, 3)
        submit = Submit(
            request_id=self._next_id,
            prompt=pack_tokens(prefix + self._tokens(rng.randint(2, 8))),
            sampling=SamplingParams(
                n=n,
                max_tokens=max_tokens,
                min_tokens=rng.choice((0, 0, 0, 1)),
                temperature=rng.choice((0.0, 0.0, 0.7, 1.5)),
                top_k=rng.choice((0, 0, 1, 40)),
                top_p=rng.choice((1.0, 1.0, 0.5)),
                min_p=rng.choice((0.0, 0.0, 0.05)),
            ).check(),
            stop_token_ids=(1, *self._tokens(rng.choice((0, 0, 2)))),
            seed=rng.getrandbits(40),
            cache_salt=rng.choice(("", "", "", "a customer's")),
            priority=rng.choice((0, 0, 0, 1)),
        )
        self._next_id += n
        return submit

    def gives_up(self) -> bool:
        return self._random.random() < 0.05

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(2, VOCAB_SIZE) for _ in range(count)]


class LongRun:
    """Feeds an engine and keeps account of what came back."""

    def __init__(self, checkpoint: Path, cache_dir: str):
        from toka.engine.build import build_engine

        config = Config(
            model=str(checkpoint),
            device="cpu",
            num_threads=NUM_THREADS,
            page_size=BLOCK_SIZE,
            cache_dir=cache_dir,
            **FLAGS,
        )
        self.engine, _ = build_engine(config, ModelSource("hf_dir", checkpoint, checkpoint, "tiny"), quiet=True)
        self.ends: Counter[str] = Counter()
        self._traffic = Traffic(seed=0)
        self._open: set[int] = set()

    def serve(self, num_requests: int) -> None:
        """Submit so many requests and run until the engine is empty."""
        submitted = 0
        while submitted < num_requests or self._open:
            while submitted < num_requests and len(self._open) < MAX_WAITING:
                submitted += 1
                self._submit(self._traffic.next())
            outputs = self.engine.step()
            if outputs is not None:
                self._take(outputs.request_ids.tolist(), outputs.finish.tolist())
        while self.engine.has_work:  # steps that were under way for requests that were aborted
            self.engine.step()

    def _submit(self, submit: Submit) -> None:
        self.engine.submit(submit)
        request_ids = range(submit.request_id, submit.request_id + submit.sampling.n)
        if self._traffic.gives_up():  # while it waits
            self._abort(list(request_ids))
        else:
            self._open.update(request_ids)

    def _take(self, request_ids: list[int], finish: list[int]) -> None:
        for request_id, reason in zip(request_ids, finish, strict=True):
            if request_id not in self._open:
                continue
            if reason != FinishReason.NONE:
                self._open.remove(request_id)
                self.ends[FinishReason(reason).name] += 1
            elif self._traffic.gives_up():  # while it runs
                self._open.remove(request_id)
                self._abort([request_id])

    def _abort(self, request_ids: list[int]) -> None:
        self.engine.abort(request_ids)
        self.ends[FinishReason.ABORT.name] += len(request_ids)

    def held(self, num_requests: int) -> Held:
        gc.collect()
        return Held(num_requests, psutil.Process().memory_info().rss, sys.getallocatedblocks())


def main(checkpoint: str, cache_dir: str, num_requests: int, num_samples: int) -> None:
    set_engine_environment(NUM_THREADS, Path(cache_dir))
    run = LongRun(Path(checkpoint), cache_dir)
    began = time.perf_counter()
    held: list[Held] = []
    for part in range(1, num_samples + 1):
        run.serve(num_requests // num_samples)
        held.append(run.held(part * num_requests // num_samples))
    stats = run.engine.stats()
    run.engine.shutdown()
    print(
        json.dumps(
            {
                "held": [asdict(each) for each in held],
                "seconds": time.perf_counter() - began,
                "ends": run.ends,
                "cached_prompt_tokens": stats.cached_prompt_tokens_total,
                "preemptions": stats.preemptions_total,
                "compiles_after_ready": stats.compiles_after_ready_total,
                "blocks_in_use": stats.num_blocks - stats.num_free_blocks,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
