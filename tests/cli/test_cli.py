"""The command line: reading flags, help, --show, errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import yaml

from toka.cli import main, read_flags
from toka.client.flags import ChatFlags, PingFlags
from toka.config import CompileFlags, Config
from toka.devices import PlanFlags
from toka.errors import ConfigError


def test_values_by_type() -> None:
    config = read_flags(
        Config,
        [
            "model=a=b", "port=1e4", "kv_cache_size_num_tokens=100_000", "drain_timeout_s=2", "tokenizer=None",
            "rope_scaling={'rope_type':'linear','factor':2.0}", "prefix_cache=F", "max_seqs_per_forward=(4*8)",
        ],
    )  # fmt: skip
    assert (config.model, config.port, config.kv_cache_num_tokens) == ("a=b", 10_000, 100_000)
    assert (config.drain_timeout_s, config.tokenizer, config.prefix_cache) == (2.0, None, False)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.max_seqs_per_forward == 32


@pytest.mark.parametrize("text", ["T", "true", "True", "1"])
def test_true(text: str) -> None:
    assert read_flags(PingFlags, [f"chat={text}"]).chat is True


@pytest.mark.parametrize("text", ["F", "false", "False", "0"])
def test_false(text: str) -> None:
    assert read_flags(Config, [f"torch_compile={text}"]).torch_compile is False


@pytest.mark.parametrize("text", ["1e5", "(hello)", "[1,2", "T", "", "None of it", "'quoted'", "tell me a joke"])
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert read_flags(PingFlags, [f"prompt={text}"]).prompt == text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("page_siz=16", "unknown flag 'page_siz'; did you mean page_size?"),
        ("kv_cache_tokens=16", "did you mean kv_cache_num_tokens"),
        ("zzzzzz=1", "lists all"),
        ("pign", "not of the form key=value"),
        ("--port", "did you mean port"),
        ("port", "port needs a value"),
        ("page_size=abc", "page_size=abc: must be a whole number"),
        ("page_size=1.5", "page_size=1.5: must be a whole number"),
        ("page_size=T", "page_size=T: must be a whole number"),
        ("drain_timeout_s=soon", "drain_timeout_s=soon: must be a number"),
        ("prefix_cache=maybe", "prefix_cache=maybe: must be T or F"),
        ("rope_scaling=5", "rope_scaling=5: must be a dictionary"),
        ("rope_scaling={x", "rope_scaling={x"),
        ("max_seqs_per_forward=(1/0)", "cannot be read"),
        ("port=None", "port=None: must be a whole number"),
    ],
)
def test_wrong_words_are_one_line_that_names_the_flag(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_flags(Config, [word])
    assert message in str(caught.value)
    assert main([word]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"toka: error: {caught.value}\n"
    assert printed.out == ""


def test_a_flag_given_twice_is_refused_also_under_its_alias() -> None:
    with pytest.raises(ConfigError, match="twice"):
        read_flags(Config, ["kv_cache_num_tokens=1", "kv_cache_size_num_tokens=2"])


def test_a_flag_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page_size=17", "--show"]) == 2
    assert "page_size=17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags"),
    [([], Config), (["compile"], CompileFlags), (["plan"], PlanFlags), (["ping"], PingFlags), (["chat"], ChatFlags)],
)
def test_help_lists_every_flag_with_its_default(
    command: list[str], flags: type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {words[0]: words for words in lines if words}
    for spec in dataclasses.fields(flags):
        default = {True: "T", False: "F"}[spec.default] if isinstance(spec.default, bool) else str(spec.default)
        for word in (*default.split(), *spec.metadata["unit"].split(), *spec.metadata["aliases"]):
            assert word in " ".join(shown[spec.name]), spec.name


def test_show_prints_yaml_of_the_resolved_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show", "port=7", "api_key=secret", "admin_key=too", "kv_cache_size_num_tokens=4096"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["port"], shown["kv_cache_num_tokens"]) == (7, 4096)
    assert shown["api_key"] == shown["admin_key"] == "(hidden)"
    assert set(shown) == {spec.name for spec in dataclasses.fields(Config)}


def test_ping_without_a_server_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "port=1"]) == 1
    assert capsys.readouterr().err.strip() == "toka: error: no server answers at 127.0.0.1:1; start one with `toka`"


def test_the_command_line_does_not_import_torch_or_the_server() -> None:
    code = "import sys, toka.cli; sys.exit(bool({'torch', 'fastapi', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
