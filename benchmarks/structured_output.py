"""What does a grammar cost a token, and does every output fit its schema? JSON on the last line.

    python benchmarks/structured_output.py [--json FILE] [--model default] [--rounds 3] [--requests 32] [--tokens 128] [--schemas 0]

Requests of one kind run together, kinds in turn, `rounds` times; figures are those of the best round, since other programs only ever add
time. free: no grammar. string: one JSON string without end, so that a step draws one token of each request, as without a grammar: what it
takes more than `free` is the cost of masks. records: an array of records without end, whose names are forced: there steps have several
tokens of a request, and fewer are needed. All draw at temperature 0.8 and run to the same number of tokens.

--schemas N: also N different schemas (json_schemas.py), one request each; every output that ends must be valid, or the program fails.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from json_schemas import Schemas
from report import publish

from toka import LLM, SamplingParams
from toka.params import StructuredOutput

STRING = {"type": "string", "minLength": 100_000}
RECORD = {
    "type": "object",
    "properties": {
        "first name": {"type": "string", "maxLength": 12},
        "year of birth": {"type": "integer", "minimum": 1900, "maximum": 2020},
        "favourite colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["first name", "year of birth", "favourite colour"],
    "additionalProperties": False,
}
RECORDS = {"type": "array", "items": RECORD, "minItems": 10_000}
KINDS: dict[str, dict[str, Any] | None] = {"free": None, "string": STRING, "records": RECORDS}
MAX_TOKENS = 400  # of an output that must be valid


def main() -> None:
    arguments = _arguments()
    with LLM(arguments.model, quiet=True) as llm:
        report = measure(llm, arguments.rounds, arguments.requests, arguments.tokens)
        if arguments.schemas:
            report |= validate(llm, arguments.schemas)
        report["compiles_after_ready"] = llm.stats().compiles_after_ready_total
    publish(report, arguments.json)


def measure(llm: LLM, num_rounds: int, num_requests: int, num_tokens: int) -> dict[str, Any]:
    """Milliseconds a token and steps of each kind, and what grammars cost beyond `free`, in per cent."""
    best_s = dict.fromkeys(KINDS, float("inf"))
    steps = {}
    for turn in range(num_rounds + 1):  # the first compiles the grammars and is not counted
        for kind, schema in KINDS.items():
            before = llm.stats().num_steps_total
            seconds = _run(llm, schema, num_requests, num_tokens, seed=turn)
            steps[kind] = llm.stats().num_steps_total - before
            if turn:
                best_s[kind] = min(best_s[kind], seconds)
    ms_per_token = {kind: 1e3 * seconds / num_tokens for kind, seconds in best_s.items()}
    cost = {kind: 100 * (ms_per_token[kind] / ms_per_token["free"] - 1) for kind in KINDS if kind != "free"}
    for kind in KINDS:
        line = f"{kind:>8}: {ms_per_token[kind]:.2f} ms a token of {num_requests} requests, {steps[kind]} steps"
        print(line if kind == "free" else f"{line}, {cost[kind]:+.1f} %", flush=True)
    return {"num_requests": num_requests, "ms_per_token": ms_per_token, "steps": steps, "cost_percent": cost}


def _run(llm: LLM, schema: dict[str, Any] | None, num_requests: int, num_tokens: int, seed: int) -> float:
    grammar = None if schema is None else StructuredOutput("json_schema", json.dumps(schema))
    params = [
        SamplingParams(
            max_tokens=num_tokens, temperature=0.8, seed=1000 * seed + i, ignore_eos=True, structured=grammar
        )
        for i in range(num_requests)
    ]
    prompts = [f"Request {seed}.{i}: write some JSON about a person.\n" for i in range(num_requests)]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert all(len(output.completions[0].token_ids) == num_tokens for output in outputs)
    return seconds


def validate(llm: LLM, num_schemas: int) -> dict[str, Any]:
    """How many outputs ended; SystemExit if one of them does not fit its schema."""
    import jsonschema  # only here: it is no dependency of toka

    schemas = [Schemas(seed).draw() for seed in range(num_schemas)]
    params = [
        SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=(0.0, 0.7, 1.0)[seed % 3],
            seed=seed,
            structured=StructuredOutput("json_schema", json.dumps(schema)),
        )
        for seed, schema in enumerate(schemas)
    ]
    outputs = llm.generate(["Some JSON:\n"] * num_schemas, params, use_tqdm=False)
    num_ended = 0
    for seed, (schema, output) in enumerate(zip(schemas, outputs, strict=True)):
        [completion] = output.completions
        if completion.finish_reason != "stop":
            continue
        num_ended += 1
        checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        try:
            checker.validate(json.loads(completion.text))
        except (ValueError, jsonschema.ValidationError) as error:
            raise SystemExit(f"the output for schema {seed} is not valid: {error}\n{completion.text}") from error
    print(f"{num_ended} of {num_schemas} outputs ended within {MAX_TOKENS} tokens, all of them valid")
    return {"num_schemas": num_schemas, "num_ended": num_ended, "num_valid": num_ended}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--schemas", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
