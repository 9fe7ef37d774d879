"""Does lm-evaluation-harness score toka as it scores transformers on the same weights? JSON on the last line; status 1 if not.

    python benchmarks/lm_eval_parity.py --lm-eval-python PYTHON [--json FILE] [--model default] [--questions 32] [--problems 12]
        [--max-tokens 64] [--serve-model]

PYTHON: the interpreter of an environment with `lm-eval[api,hf]==0.4.13`. The model's weights are written as a Hugging Face directory in
float32 for lm-eval's `hf` backend, and toka serves that directory; with --serve-model it serves the model as it is. Two tasks are made from
local GSM8K files: `sentences`, multiple choice in the manner of ARC (which of four sentences goes on from this question: one of its own
solution, or of three others'), and `gsm8k_4shot`, generation after four worked examples. lm-eval runs them through its `hf` backend and as
a client of toka's /v1/completions, with 16 requests at once: once with token prompts, made by the tokenizer that the server offers, once
with texts. Wanted: every log-likelihood within 1e-3, the same choices likeliest, every generated text and every score equal. That cannot be
had with --serve-model of a GGUF file: toka computes with its integer codes, and transformers' reading of its tokenizer cuts some spaces
otherwise than llama.cpp and toka do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_checkpoint import write_hf_checkpoint
from report import publish
from startup import ready_toka

from toka.config import Config, hub_offline
from toka.model_source import ModelSource, locate

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
CHOICE_TASK, GENERATE_TASK = "sentences", "gsm8k_4shot"
MAX_LENGTH = 2048
MAX_LOGLIKELIHOOD_DIFFERENCE = 1e-3
NUM_CONCURRENT = 16


@dataclass(frozen=True)
class Outcome:
    """What one run of lm-eval found. scores: by task and metric. loglikelihoods: (sum of logprobs, whether greedy decoding gives it) of
    each question's choices. texts: what was generated.
    """

    scores: dict[str, float]
    loglikelihoods: list[tuple[float, bool]]
    texts: list[str]


def write_tasks(folder: Path, num_questions: int, num_problems: int, max_tokens: int) -> None:
    """The two tasks as lm-eval reads them, with their data beside them."""
    train, test = (
        [json.loads(line) for line in (GSM8K / name).read_text().splitlines()]
        for name in ("train_first200.jsonl", "test_first660.jsonl")
    )
    _write_lines(folder / "train.jsonl", train)
    _write_lines(folder / "problems.jsonl", test[:num_problems])
    _write_lines(folder / "questions.jsonl", _questions(test, num_questions))
    source = {"dataset_path": "json", "dataset_name": None, "test_split": "test"}
    choices = {
        "task": CHOICE_TASK,
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    generation = {
        "task": GENERATE_TASK,
        "dataset_kwargs": {
            "data_files": {"train": str(folder / "train.jsonl"), "test": str(folder / "problems.jsonl")}
        },
        "output_type": "generate_until",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 4,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": max_tokens, "do_sample": False, "temperature": 0},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {"function": "regex", "regex_pattern": "(-?[0-9][0-9.,]*)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"]}],
    }
    for task in (choices, generation):  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(source | task))


def _questions(problems: Sequence[dict[str, str]], count: int) -> list[dict[str, Any]]:
    """Each with the last sentence of its own solution before the result, and of three others', in an order drawn once."""
    order = random.Random(0)
    sentences = [problem["answer"].split("\n")[-2] for problem in problems]
    made = []
    for index, problem in enumerate(problems[:count]):
        choices = [index, *order.sample([other for other in range(len(problems)) if other != index], 3)]
        order.shuffle(choices)
        texts = [sentences[choice] for choice in choices]
        made.append({"question": problem["question"], "choices": texts, "gold": choices.index(index)})
    return made


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(python: str, tasks: Path, name: str, backend: str, **arguments: object) -> Outcome:
    """Run lm-eval on both tasks. name: of the folder for its output. arguments: of the backend."""
    output = tasks / name
    command = [python, "-m", "lm_eval", "run", "--model", backend, "--tasks", f"{CHOICE_TASK},{GENERATE_TASK}"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--include_path", str(tasks), "--output_path", str(output), "--log_samples", "--device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hf_home")}
    log = output.with_suffix(".log")
    with log.open("w") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"lm-eval ended with status {status}:\n{log.read_text()[-4000:]}")
    return _read_outcome(output)


def _read_outcome(output: Path) -> Outcome:
    [results] = output.rglob("results_*.json")
    scores = {
        f"{task} {metric}": value
        for task, metrics in json.loads(results.read_text())["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    samples = {task: _samples(output, task) for task in (CHOICE_TASK, GENERATE_TASK)}
    answers = [answer for sample in samples[CHOICE_TASK] for [answer] in sample["resps"]]
    return Outcome(
        scores,
        [(float(value), str(greedy) == "True") for value, greedy in answers],
        [sample["resps"][0][0] for sample in samples[GENERATE_TASK]],
    )


def _samples(output: Path, task: str) -> list[dict[str, Any]]:
    """In the order of the documents."""
    [path] = output.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def compare(found: Outcome, wanted: Outcome) -> dict[str, Any]:
    """How far `found` is from `wanted`; `equal` if as near as promised."""
    pairs = list(zip(found.loglikelihoods, wanted.loglikelihoods, strict=True))
    difference = max(abs(mine[0] - theirs[0]) for mine, theirs in pairs)
    figures = {
        "max_loglikelihood_difference": difference,
        "num_other_greedy": sum(mine[1] != theirs[1] for mine, theirs in pairs),
        "num_other_texts": sum(mine != theirs for mine, theirs in zip(found.texts, wanted.texts, strict=True)),
        "scores": found.scores,
    }
    exact = figures["num_other_greedy"] == figures["num_other_texts"] == 0 and found.scores == wanted.scores
    return figures | {"equal": exact and difference <= MAX_LOGLIKELIHOOD_DIFFERENCE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval-python", required=True, help="interpreter of an environment with lm-eval[api,hf]")
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    parser.add_argument("--model", default="default")
    parser.add_argument("--questions", type=int, default=32, help="of four choices each")
    parser.add_argument("--problems", type=int, default=12, help="to generate an answer to")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--serve-model", action="store_true", help="toka serves the model itself, not the checkpoint")
    arguments = parser.parse_args()
    cache = Config().cache_path()
    source = locate(arguments.model, None, cache, offline=hub_offline())
    with tempfile.TemporaryDirectory() as directory:
        tasks, checkpoint = Path(directory), Path(directory, "checkpoint")
        write_tasks(tasks, arguments.questions, arguments.problems, arguments.max_tokens)
        write_hf_checkpoint(source, checkpoint)
        if not arguments.serve_model:
            source = ModelSource("hf_dir", checkpoint, checkpoint, source.name)
        outcomes = dict(_outcomes(arguments.lm_eval_python, tasks, checkpoint, source, cache))
    wanted = outcomes.pop("hf")
    report: dict[str, Any] = {
        "model": source.name,
        "num_loglikelihoods": len(wanted.loglikelihoods),
        "num_texts": len(wanted.texts),
        "hf": {"scores": wanted.scores},
        **{name: compare(found, wanted) for name, found in outcomes.items()},
    }
    publish(report, arguments.json)
    if not all(report[name]["equal"] for name in outcomes):
        raise SystemExit(1)


def _outcomes(
    python: str, tasks: Path, checkpoint: Path, source: ModelSource, cache: Path
) -> Iterator[tuple[str, Outcome]]:
    """By name: the reference's, then toka's by token prompts and by texts."""
    yield "hf", evaluate(python, tasks, "hf", "hf", pretrained=checkpoint, dtype="float32", max_length=MAX_LENGTH)
    with ready_toka(source, cache) as (_, port):
        client = {
            "model": "default",
            "base_url": f"http://127.0.0.1:{port}/v1/completions",
            "num_concurrent": NUM_CONCURRENT,
            "max_length": MAX_LENGTH,
            "max_retries": 1,
        }
        yield "tokens", evaluate(python, tasks, "tokens", "local-completions", **client)
        texts = {"tokenized_requests": False, "tokenizer_backend": "huggingface", "tokenizer": checkpoint}
        yield "texts", evaluate(python, tasks, "texts", "local-completions", **client, **texts)


if __name__ == "__main__":
    main()
