"""`toka compile`: its artifact starts where there is no compiler, and gives the same tokens."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toka import LLM, SamplingParams
from toka.cli import main
from toka.config import Config
from toka.model_source import ModelSource

FLAGS = {"kv_cache_num_tokens": 8192, "max_seqs_per_forward": 8}
PROMPTS = ["The capital of France is", "Once upon a time, in a small village,"]
MAX_TOKENS = 24

# What the other process does: start from the artifact, generate, and say whether the compiler was so much as imported.
START = """
import json, sys
from toka import LLM, SamplingParams
path, flags, prompts, max_tokens = json.loads(sys.argv[1])
with LLM(path, quiet=True, **flags) as llm:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0), use_tqdm=False)
    tokens = [output.completions[0].token_ids for output in outputs]
    print(json.dumps([tokens, "torch._inductor.compile_fx" in sys.modules, llm.stats().compiles_after_ready_total]))
"""


@pytest.fixture(scope="module")
def artifact(smollm2: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compiled")
    words = [f"{name}={value}" for name, value in FLAGS.items()]
    assert main(["compile", f"model={smollm2.path}", f"out={directory}/out", f"dump={directory}/dump", *words]) == 0
    return directory


def test_the_artifact_starts_without_a_compiler_and_gives_the_same_tokens(
    artifact: Path, smollm2: ModelSource, tmp_path: Path
) -> None:
    with LLM(str(smollm2.path), quiet=True, **FLAGS) as llm:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        expected = [list(each.completions[0].token_ids) for each in llm.generate(PROMPTS, params, use_tqdm=False)]
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "TOKA_CACHE")}
    environment |= {"PATH": str(tmp_path), "TOKA_CACHE": str(tmp_path / "empty cache")}
    given = [str(smollm2.path), FLAGS | {"artifact": f"{artifact}/out"}, PROMPTS, MAX_TOKENS]
    ran = subprocess.run(
        [sys.executable, "-c", START, json.dumps(given)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    tokens, compiler_imported, late_compiles = json.loads(ran.stdout.splitlines()[-1])
    assert tokens == expected
    assert (compiler_imported, late_compiles) == (False, 0)


def test_weights_are_not_inside(artifact: Path, smollm2: ModelSource) -> None:
    size = sum(path.stat().st_size for path in (artifact / "out").iterdir())
    assert size < 0.2 * smollm2.path.stat().st_size


def test_the_dump_has_a_graph_and_a_difference_for_each_pass(artifact: Path) -> None:
    from toka.compile.pipeline import PASSES

    for region in ("begin", "layer_full", "last"):
        names = ["00-trace", *[f"{index:02d}-{each.name}" for index, each in enumerate(PASSES, 1)]]
        graphs = [(artifact / "dump" / region / f"{name}.txt").read_text() for name in names]
        changes = [(artifact / "dump" / region / f"{name}.diff").read_text() for name in names[1:]]
        for (before, after), change in zip(itertools.pairwise(graphs), changes, strict=True):
            assert bool(change.strip()) == (before != after)
    merged = (artifact / "dump" / "layer_full" / "03-merge_linears.diff").read_text()
    lines = [line for line in merged.splitlines() if "toka.linear_quantised" in line]
    assert (sum(line.startswith("-") for line in lines), sum(line.startswith("+") for line in lines)) >= (5, 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dtype": "bfloat16"}, "dtype differs: it was made for float32, this start has bfloat16"),
        ({"page_size": 32}, "page_size differs: it was made for 16, this start has 32"),
    ],
    ids=["dtype", "page_size"],
)
def test_an_artifact_for_other_flags_is_refused_by_name(
    artifact: Path, smollm2: ModelSource, flags: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from toka.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        LLM(str(smollm2.path), quiet=True, **(FLAGS | flags), artifact=f"{artifact}/out")


def test_it_says_why_each_kernel_was_chosen(
    artifact: Path, smollm2: ModelSource, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = [f"{name}={value}" for name, value in FLAGS.items()]
    assert main(["compile", f"model={smollm2.path}", *words]) == 0
    said = capsys.readouterr().out
    assert f"artifact: {Config().cache_path()}" in said
    for op in ("linear_quantised", "paged_attention", "rope_write_kv", "sample"):
        assert any(line.split()[0] == op and "cpp, priority 10" in line for line in said.splitlines() if line.strip())


def test_flags_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compile", "torch_compile=F"]) == 2
    assert "torch_compile=F: there is nothing to compile" in capsys.readouterr().err
    assert main(["compile", f"artifact={tmp_path}"]) == 2
    assert "name its directory with out=" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["compile", *[f"{name}={value}" for name, value in FLAGS.items()], f"out={tmp_path}"]) == 2
    assert f"out={tmp_path}: is not empty and holds no artifact" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"
