"""`toka plan` foretells what the warmup then finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toka.cli import main
from toka.config import Config
from toka.devices import KNOWN_DEVICES, PlanFlags
from toka.errors import ConfigError
from toka.model_source import ModelSource
from toka.warmup.plan import make_plan
from toka.warmup.run import warm_up
from toka.warmup.setup import settle
from toka.weights.loader import open_checkpoint

MAX_ERROR = 0.05  # of the foretold activations, relative to the measured peak


def flags(model: Path, **changes: Any) -> PlanFlags:
    return PlanFlags(**({"model": str(model), "max_tokens_per_forward": 64, "max_seqs_per_forward": 8} | changes))


def assert_foretold(source: ModelSource, chosen: dict[str, Any]) -> None:
    """Start an engine with these flags and hold what it measured against the plan."""
    planned = make_plan(PlanFlags(**chosen))
    report = warm_up(settle(Config(**chosen), source), open_checkpoint(source.path), quiet=True).report
    assert report.memory is not None
    assert planned.table.weights == report.memory.weights
    assert planned.table.tables == report.memory.tables
    assert planned.table.kv_cache == report.memory.kv_cache
    assert planned.kv_tokens == report.kv_tokens
    assert planned.table.activations == pytest.approx(report.memory.activations, rel=MAX_ERROR)
    assert planned.kernels == report.kernels


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", (64, 8)), ("llama", (16, 16)), ("llama", (200, 3)), ("qwen2", (64, 8)), ("qwen3", (64, 8))],
    ids=str,
)
def test_the_plan_is_what_the_warmup_measures(
    family: str, sizes: tuple[int, int], random_checkpoint: Callable[[str], Path], cache_dir: Path
) -> None:
    path = random_checkpoint(family)
    chosen = {
        "model": str(path),
        "device": "cpu",
        "cache_dir": str(cache_dir),
        "num_threads": 2,
        "max_tokens_per_forward": sizes[0],
        "max_seqs_per_forward": sizes[1],
    }
    assert_foretold(ModelSource("hf_dir", path, path, path.name), chosen)


def test_the_plan_of_the_default_model_is_what_the_warmup_measures(default_model: ModelSource, cache_dir: Path) -> None:
    """With the flags that shape code at their defaults, so that all tests that start this model share its artifact."""
    chosen = {"model": "default", "device": "cpu", "cache_dir": str(cache_dir), "kv_cache_num_tokens": 64 * 1024}
    assert_foretold(default_model, chosen)


@pytest.fixture(scope="module")
def configuration(random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a configuration and no weights."""
    directory = tmp_path_factory.mktemp("configuration only")
    (directory / "config.json").write_text((random_checkpoint("qwen2") / "config.json").read_text())
    return directory


def test_a_device_that_is_not_here_and_weights_that_are_not_here(configuration: Path) -> None:
    planned = make_plan(flags(configuration, device="h200"))
    device = KNOWN_DEVICES["h200"]
    assert sum(planned.table.rows().values()) == device.usable_bytes
    assert planned.device == "h200 (sm_90)"
    assert planned.table.graph_pools > 0
    assert planned.num_full_requests == 8  # no step has more rows
    assert planned.weights_read_ms == pytest.approx(planned.table.weights / device.bytes_per_s * 1e3)


def test_flags_count(configuration: Path) -> None:
    table = make_plan(flags(configuration, device="l40s", use_cudagraphs=False)).table
    other = make_plan(
        flags(configuration, device="l40s", dtype="bfloat16", max_tokens_per_forward=128, kv_cache_num_tokens=1000)
    )
    assert table.graph_pools == 0 < other.table.graph_pools
    assert other.table.activations == pytest.approx(table.activations, rel=0.02)  # twice the tokens of half the size
    assert other.table.weights < table.weights  # the rope's frequencies stay float32
    assert (other.kv_tokens, other.num_kv_blocks, other.num_full_requests) == (992, 62, 3)


def test_what_does_not_fit_is_refused_by_flag_and_size(configuration: Path, tmp_path: Path) -> None:
    config = json.loads((configuration / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 65536, "intermediate_size": 262144}))
    with pytest.raises(ConfigError, match=r"device=rtx4090: the weights of .* need [0-9.,]+ GiB in float32, 22.91 GiB"):
        make_plan(flags(tmp_path, device="rtx4090"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2_000_000}))
    with pytest.raises(ConfigError, match=r"max_tokens_per_forward=8192: a step needs [0-9.,]+ GiB"):
        make_plan(flags(tmp_path, device="rtx4090", max_tokens_per_forward=8192, max_seqs_per_forward=8192))
    with pytest.raises(ConfigError, match=r"kv_cache_num_tokens=100000000 needs [0-9.]+ GiB"):
        make_plan(flags(configuration, device="rtx4090", kv_cache_num_tokens=100_000_000))


def test_a_cache_smaller_than_a_request_is_said(configuration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"model={configuration}", "device=a100", "kv_cache_num_tokens=100"]) == 0
    assert "holds no request of full length: max_num_tokens_per_request becomes 97" in capsys.readouterr().out


def test_the_command_prints_a_table_or_json(configuration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", f"model={configuration}", "device=b200", "max_tokens_per_forward=64"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for name in ("weights", "tables", "activations", "graph pools", "workspace", "kv cache", "headroom"):
        assert f" {name} " in text
    assert main([*words, "json=T"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert f"{values['bytes']['weights']:,}" in text
    assert values["kv_tokens"] == 16 * values["kv_blocks"]


def test_an_unknown_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "device=tpu"]) == 2
    assert "device=tpu: must be one of auto, cpu, cuda, a100" in capsys.readouterr().err
