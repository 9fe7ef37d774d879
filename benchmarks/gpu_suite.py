"""Everything worth knowing of one GPU, in one command of less than nine minutes: `python benchmarks/gpu_suite.py`.

    a machine    the device, its copy bandwidth and its matrix products per second
    b kernels    paged attention against torch's SDPA, FlexAttention and FlashInfer; the sampler against PyTorch's operators
    c step       decode by batch size, prefill by prompt length: share of the device's limits
    d engine     from submit to last token, against transformers' generate (static cache, compiled); the host's time per step
    e start      from process start to ready, with an empty cache and with a full one
    f monkeys    many samples of a few prompts with a long shared prefix
    g tune       launch parameters of the Triton kernels, as far as the time goes
    h hydragen   decode rows with a common prefix: attention to it once for all of them, against row by row

The models are Llama-3.2-1B and Llama-3.1-8B with random weights in bfloat16. What matters most comes first, each result is printed as soon
as it is there, and the last line is all of them as JSON; so a run that is cut off still tells something. Each group of sections runs in
a process of its own: when one fails, its traceback's last lines are noted and the others go on.

Needs torch, triton, transformers, numpy, safetensors and what PyTorch images have beside them; toka need not be installed. On a machine
without a GPU, `--device cpu --shape tiny --eager` shows that the suite works.

    --device cpu|cuda  --shape tiny|1b|8b (comma-separated)  --sections a,b,...  --budget-s 520  --json FILE  --log FILE
    --cache DIR (else an empty one, removed at the end)  --eager (nothing is compiled)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import bare_checkout

NAMES = ("machine", "kernels", "step", "engine", "start", "monkeys", "tune", "hydragen")
SECTIONS = dict(zip("abcdefgh", NAMES, strict=True))
WITHOUT_SHAPE = {"machine", "kernels", "sampler", "hydragen", "tune"}
START_BUDGET_S = 150.0
GRACE_S = 15.0  # what a section may take beyond its time: it looks at the clock between its parts only
LEAST_S = 10.0  # with less left, nothing is begun
LOG_LINES = 4


@dataclasses.dataclass(frozen=True)
class Work:
    """Sections for one process, with the seconds that each may take."""

    shape: str
    sections: tuple[tuple[str, float], ...]
    start_key: str = ""


def plan_work(wanted: set[str], shapes: list[str]) -> list[Work]:
    """What to run, the most valuable first; names as in SECTIONS."""
    work = []
    without_engine = [("machine", 20.0)] if "machine" in wanted else []
    if "kernels" in wanted:
        without_engine += [("kernels", 65.0), ("sampler", 15.0)]
    if "hydragen" in wanted:
        without_engine.append(("hydragen", 20.0))
    if without_engine:
        work.append(Work(shapes[0], tuple(without_engine)))
    on_engine = tuple(each for each in (("step", 40.0), ("engine", 20.0), ("monkeys", 25.0)) if each[0] in wanted)
    for shape in shapes:
        if on_engine or "start" in wanted:
            work.append(Work(shape, (("start", START_BUDGET_S), *on_engine), "cold"))
        if "engine" in wanted:
            work.append(Work(shape, (("peer", 75.0),)))
    if "start" in wanted:
        work += [Work(shape, (("start", START_BUDGET_S),), "warm") for shape in reversed(shapes)]
    if "tune" in wanted:
        work.append(Work(shapes[0], (("tune", 100.0),)))
    return work


class Suite:
    """Runs work and gathers the results: section → shape → key → value."""

    def __init__(self, options: argparse.Namespace, cache: Path, log: IO[str]):
        self._options, self._cache, self._log = options, cache, log
        self._end = time.monotonic() + options.budget_s
        self._began = time.monotonic()
        self.results: dict[str, Any] = {}
        self.errors: list[dict[str, str]] = []

    def run(self, work: Work) -> None:
        """Run the sections; those after one that failed get a fresh process, unless the engine itself did not start."""
        sections, start_key = work.sections, work.start_key
        while sections:
            failed = self._run_process(dataclasses.replace(work, sections=sections, start_key=start_key))
            if failed is None:
                return
            place = [name for name, _ in sections].index(failed)
            rest = sections[place + 1 :]
            if failed == "start" and rest:
                self._note_error(work.shape, ", ".join(name for name, _ in rest), "the engine did not start")
                return
            needs_engine = work.sections[0] if work.sections[0][0] == "start" else None
            sections = (needs_engine, *rest) if needs_engine and rest else rest
            start_key = "after_failure"

    def _run_process(self, work: Work) -> str | None:
        """Returns the section that failed, or None."""
        names = [name for name, _ in work.sections]
        limit_s = min(sum(seconds for _, seconds in work.sections) + GRACE_S, self._end - time.monotonic())
        if limit_s < LEAST_S:
            self._note_error(work.shape, ", ".join(names), "not begun: no time left")
            return None
        running, error = names[0], ""
        with _process(self._job(work), self._log) as process:
            for line in _lines(process, limit_s):
                running, error = line.get("begin", running), line.get("error", error)
                if "section" in line:
                    self._note(work.shape, **line)
            was_cut = process.poll() is None
        if was_cut:
            error = error or f"cut off after {limit_s:.0f} s"
        elif process.returncode == 0:
            return None
        self._note_error(work.shape, running, error or f"exit status {process.returncode}: {self._last_lines()}")
        return running

    def _job(self, work: Work) -> dict[str, Any]:
        left_s = self._end - time.monotonic()
        return {
            "sections": [(name, min(seconds, left_s)) for name, seconds in work.sections],
            "device": self._options.device,
            "shape": work.shape,
            # Apart from the engine's, whose first start is one with nothing in the cache.
            "cache": str(self._cache if work.start_key else self._cache / "others"),
            "compiled": not self._options.eager,
            "start_key": work.start_key,
            "began_at": time.time(),
        }

    def _note(self, shape: str, section: str, key: str, value: Any) -> None:
        by_shape = self.results.setdefault(section, {})
        place = by_shape if section in WITHOUT_SHAPE else by_shape.setdefault(shape, {})
        known, place[key] = place.get(key, {}), value
        news = {name: value[name] for name in value if name not in known} if isinstance(value, dict) else value
        self._print(f"{section} {shape} {key} {json.dumps(news)}")

    def _note_error(self, shape: str, section: str, error: str) -> None:
        self.errors.append({"section": section, "shape": shape, "error": error})
        self._print(f"FAILED {section} {shape}: {error}")

    def _print(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {line}", flush=True)
        self.save()

    def _last_lines(self) -> str:
        self._log.flush()
        lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-LOG_LINES:])[-600:]

    def report(self) -> dict[str, Any]:
        """All results, with what follows from several of them."""
        return {
            "seconds": round(time.monotonic() - self._began, 1),
            "device": self._options.device,
            "stand_ins": self._options.stand_ins,
            **self.results,
            "errors": self.errors,
            "summary": summary_of(self.results),  # last, where an output that is cut at the front still has it
        }

    def save(self) -> None:
        """Write what is there to the file that was asked for, so that it is there whenever the run ends."""
        if self._options.json:
            self._options.json.write_text(json.dumps(self.report()) + "\n")


def summary_of(results: dict[str, Any]) -> dict[str, Any]:
    """The figures to look at first, of each shape."""
    summary: dict[str, Any] = {}
    for shape, step in results.get("step", {}).items():
        summary[f"{shape}_decode_share_of_copy"] = {
            key.removeprefix("decode_"): figures["share_of_copy"]
            for key, figures in step.items()
            if key.startswith("decode_")
        }
        summary[f"{shape}_prefill_share_of_matmul"] = {
            key.removeprefix("prefill_"): figures["share_of_matmul"]
            for key, figures in step.items()
            if key.startswith("prefill_")
        }
    for shape, batches in results.get("engine", {}).items():
        peer = results.get("peer", {}).get(shape, {})
        summary[f"{shape}_over_transformers"] = {
            key.removeprefix("batch_"): round(figures["tokens_per_s"] / peer[key]["tokens_per_s"], 3)
            for key, figures in batches.items()
            if key in peer
        }
    for shape, starts in results.get("start", {}).items():
        summary[f"{shape}_ready_s"] = {key: figures["ready_s"] for key, figures in starts.items()}
    if groups := results.get("hydragen"):
        summary["hydragen_over_plain"] = {key: figures["over_plain"] for key, figures in groups.items()}
    for shape, runs in results.get("monkeys", {}).items():
        summary[f"{shape}_monkeys_tokens_per_s"] = runs["run"]["tokens_per_s"]
    return summary


# ------------------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def _process(job: dict[str, Any], log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """A worker on a job; stopped at the end with all processes that it started."""
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_sections.worker", json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()  # its output stays open: some process of another session that it started may still hold the other end


def _lines(process: subprocess.Popen[str], limit_s: float) -> Iterator[dict[str, Any]]:
    """What the worker says, until it ends or its time is over."""
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed when its time is over
            for line in process.stdout:
                said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + limit_s
    while True:
        try:
            line = said.get(timeout=max(end - time.monotonic(), 0))
        except queue.Empty:
            return
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
            return
        yield json.loads(line)


# --------------------------------------------------------------------------------------------------------------- command


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", help="tiny, 1b, 8b; several with commas; default: 8b,1b on cuda, tiny on cpu")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="letters or names, with commas")
    parser.add_argument("--budget-s", type=float, default=520.0)
    parser.add_argument("--json", type=Path, help="also write the JSON to this file, after every result")
    parser.add_argument("--log", type=Path, help="where the progress of the workers goes; default: a temporary file")
    parser.add_argument("--cache", type=Path, help="toka's cache directory; default: an empty one")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    options = parser.parse_args()
    options.shapes = (options.shape or ("8b,1b" if options.device == "cuda" else "tiny")).split(",")
    options.wanted = {SECTIONS.get(name, name) for name in options.sections.split(",")}
    if unknown := sorted(options.wanted - set(SECTIONS.values())):
        parser.error(f"--sections: unknown {unknown[0]!r}; known: {', '.join(SECTIONS.values())}")
    if unknown := sorted(set(options.shapes) - {"tiny", "1b", "8b"}):
        parser.error(f"--shape: unknown {unknown[0]!r}; known: tiny, 1b, 8b")
    return options


def main() -> int:
    options = _options()
    options.stand_ins = bare_checkout.prepare()
    with tempfile.TemporaryDirectory(prefix="toka-gpu-suite-") as folder:
        log_path = options.log or Path(folder) / "log"
        with log_path.open("w") as log:
            suite = Suite(options, (options.cache or Path(folder) / "cache").absolute(), log)
            for work in plan_work(options.wanted, options.shapes):
                suite.run(work)
    report = suite.report()
    suite.save()
    print(json.dumps(report), flush=True)
    return 1 if suite.errors else 0


if __name__ == "__main__":
    sys.exit(main())
