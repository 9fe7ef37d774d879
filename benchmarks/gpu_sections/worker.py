"""Runs some sections in a process of their own: `python -m gpu_sections.worker JOB`, started by gpu_suite.py.

A process of its own, since an error on a GPU often leaves it useless to the process, and since only a process can be stopped at any time
and gives back all memory. Each result is a line of JSON on standard output as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bare_checkout

TRACEBACK_LINES = 7
FAILED = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """sections: name and seconds of each, in order. shape: key of SHAPES. compiled: False runs everything eagerly. start_key: what
    the first start of this job is called in the results. began_at: time.time() when the process was asked for.
    """

    sections: tuple[tuple[str, float], ...]
    device: str
    shape: str
    cache: str
    compiled: bool
    start_key: str
    began_at: float


class Worker:
    """The sections of a job, which share one engine."""

    def __init__(self, job: Job):
        from gpu_sections.shapes import SHAPES

        self._job, self._shape = job, SHAPES[job.shape]
        self._engine: Any = None

    def results(self, section: str, budget_s: float) -> Iterator[tuple[str, Any]]:
        """Run a section; yields the name and the value of each result."""
        import torch

        from gpu_sections import (
            attention,
            generation,
            machine,
            model_step,
            sampling,
            shared_prefix,
            transformers_peer,
            tuning,
        )
        from gpu_sections.measure import Deadline

        job, deadline, device = self._job, Deadline(budget_s), torch.device(self._job.device)
        match section:
            case "machine":
                yield from machine.measure(device)
            case "kernels":
                yield from attention.measure(device, deadline, compiled=job.compiled)
            case "sampler":
                yield from sampling.measure(device, deadline)
            case "hydragen":
                yield from shared_prefix.measure(device, deadline)
            case "tune":
                yield from tuning.measure(device, deadline)
            case "start":
                yield job.start_key, self._start()
            case "step":
                yield from model_step.measure(self._engine, self._shape, deadline)
            case "engine":
                yield from generation.measure(self._engine, self._shape, deadline)
            case "peer":
                yield from transformers_peer.measure(self._shape, device, deadline, compiled=job.compiled)
            case "monkeys":
                yield from generation.measure_monkeys(self._engine, self._shape, deadline)
            case _:
                raise ValueError(f"unknown section {section!r}")

    def _start(self) -> dict[str, Any]:
        from gpu_sections.built_engine import build

        job = self._job
        self._engine = build(self._shape, job.device, Path(job.cache), compiled=job.compiled, log_progress=True)
        report: Any = self._engine.ready.report
        times = {
            "ready_s": time.time() - job.began_at,
            "compile_s": sum(report["phases_s"].get(phase, 0.0) for phase in ("kernels", "trace", "compile")),
            "phases_s": report["phases_s"],
        }
        if job.start_key == "warm":
            return times
        return times | {
            "kv_tokens": self._engine.ready.num_kv_blocks * self._engine.ready.block_size,
            "memory_mib": {name: size / 2**20 for name, size in report["memory"].items()},
            "num_buckets": len(report["buckets"]),
            "kernels": {op: kernel.split(" ")[0] for op, kernel in report["kernels"].items()},
        }

    def close(self) -> None:
        if self._engine is not None:
            self._engine.core.shutdown()


def main() -> int:
    fields = json.loads(sys.argv[1])
    job = Job(**{**fields, "sections": tuple((name, budget) for name, budget in fields["sections"])})
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where the progress goes; only results are on standard output
    bare_checkout.prepare()
    from toka.config import num_available_cores, set_engine_environment

    set_engine_environment(num_available_cores(), Path(job.cache))
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(job.cache) / "triton"))

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=results, flush=True)

    from gpu_sections.measure import rounded

    worker = Worker(job)
    try:
        for section, budget_s in job.sections:
            tell(begin=section)
            for key, value in worker.results(section, budget_s):
                tell(section=section, key=key, value=rounded(value))
            tell(end=section)
    except Exception:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
        tell(error=" | ".join(lines[-TRACEBACK_LINES:])[-700:])
        os._exit(FAILED)  # whatever the engine's thread may still wait for
    worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
