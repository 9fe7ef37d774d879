"""The command line (floor 9, no torch): `toka key=value ...` serves, `toka compile` makes a model's code ahead of time, `toka plan`
foretells its memory, `toka ping` and `toka chat` ask a running server.

The syntax is pydra's: `key=value`, T and F for booleans, `(expression)` for Python, `--show` to print and leave. pydra itself has
no help, takes `flag=false` for True and turns the text 1e5 into a number; so it parses here, and types are checked against the
flags of the command.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydra.parser import Assignment, parse
from rich.console import Console
from rich.table import Table

from toka.client.flags import ChatFlags, PingFlags
from toka.config import CompileFlags, Config, num_available_cores, set_engine_environment
from toka.devices import PlanFlags
from toka.errors import ConfigError

EXIT_CONFIG = 2
_TRUE, _FALSE = ("T", "true", "True", "TRUE", "1"), ("F", "false", "False", "FALSE", "0")
_SERVE = "serve"

Flags = TypeVar("Flags")


_COMMANDS: dict[str, tuple[type[Any], str]] = {
    _SERVE: (Config, "serve a model over HTTP"),
    "compile": (CompileFlags, "compile a model ahead of time, for this machine, without loading weights"),
    "plan": (PlanFlags, "say where memory would go, here or on another device, without loading weights"),
    "ping": (PingFlags, "send one prompt to a running server, print the text, tokens/s and time to first token"),
    "chat": (ChatFlags, "talk to a running server; Ctrl-D ends"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The `toka` script; returns the exit status (2 for a wrong command line or configuration)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words and words[0] in _COMMANDS else _SERVE
    flags_type = _COMMANDS[command][0]
    if any(word in ("--help", "-h", "help") for word in words):
        _print_help(command, flags_type)
        return 0
    try:
        flags = read_flags(flags_type, [word for word in words if word != "--show"])
        if "--show" in words:
            _show(flags)
            return 0
        return _run(command, flags)
    except ConfigError as error:
        print(f"toka: error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 130


def _run(command: str, flags: Any) -> int:
    # Imported here, so that --help and --show need not wait for FastAPI or the openai package.
    match command:
        case "ping":
            from toka.client.ping import ping

            return ping(flags)
        case "chat":
            from toka.client.chat import chat

            return chat(flags)
        case "compile":
            set_engine_environment(flags.check().num_threads or num_available_cores(), flags.cache_path())
            from toka.warmup.compile_command import run as run_compile

            return run_compile(flags)
        case "plan":
            from toka.warmup.plan import run

            return run(flags)
        case _:
            from toka.server.engine_process import EngineProcess

            process = EngineProcess(flags.check())  # it imports torch while this process imports the HTTP server
            from toka.server.launch import serve

            return serve(flags, process)


# ---------------------------------------------------------------------------------------------------------- reading flags


def read_flags(flags_type: type[Flags], words: Sequence[str]) -> Flags:
    """The flags that `key=value` words set, the others at their defaults.

    Raises ConfigError for a word of another form, an unknown key (naming the nearest) or a value of the wrong type.
    """
    specs = {spec.name: spec for spec in dataclasses.fields(flags_type)}  # type: ignore[arg-type]
    names = {alias: spec.name for spec in specs.values() for alias in (spec.name, *spec.metadata["aliases"])}
    hints = typing.get_type_hints(flags_type)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in names:
            raise ConfigError(_unknown(word, key, bool(equals), list(names)))
        if not equals:
            raise ConfigError(f"{key} needs a value: {key}=...")
        if names[key] in values:
            raise ConfigError(f"{key} is given twice")
        values[names[key]] = _value(key, text, hints[names[key]])
    return flags_type(**values)


def _unknown(word: str, key: str, is_assignment: bool, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key.lstrip("-"), known, 1, 0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    if is_assignment:
        return f"unknown flag {key[:60]!r}{hint or '; `toka --help` lists all'}"
    return f"{word[:60]!r} is not of the form key=value{hint or '; `toka --help` lists all flags and commands'}"


def _value(key: str, text: str, hint: Any) -> Any:
    """text as the flag's type. Strings are taken as they stand; the rest is parsed by pydra."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in kinds and text in ("None", "none", "null"):
        return None
    [kind] = [kind for kind in kinds if kind is not types.NoneType]
    if kind is str:
        return text
    if kind is bool:
        if text not in _TRUE + _FALSE:
            raise ConfigError(f"{key}={text[:40]}: must be T or F")
        return text in _TRUE
    parsed = _parsed(key, text)
    is_number = isinstance(parsed, int | float) and not isinstance(parsed, bool)
    if kind is float and is_number:
        return float(parsed)
    if kind is int and is_number and parsed == int(parsed):
        return int(parsed)  # 1e5 is a whole number too
    if typing.get_origin(kind) is dict and isinstance(parsed, dict):
        return parsed
    wanted = {int: "a whole number", float: "a number"}.get(kind, "a dictionary such as {'factor':2.0}")
    raise ConfigError(f"{key}={text[:40]}: must be {wanted}")


def _parsed(key: str, text: str) -> Any:
    try:
        [command] = parse([f"{key}={text}"]).commands
    except Exception as error:  # an expression in parentheses may raise anything
        raise ConfigError(f"{key}={text[:40]}: cannot be read ({error})") from error
    assert isinstance(command, Assignment)
    return command.kv_pair.value


# ---------------------------------------------------------------------------------------------------------------- output


def _print_help(command: str, flags_type: type[Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    prefix = "toka" if command == _SERVE else f"toka {command}"
    console.print(f"[bold]{prefix}[/] \\[key=value ...] \\[--show]    {_COMMANDS[command][1]}")
    if command == _SERVE:
        for name, (_, summary) in list(_COMMANDS.items())[1:]:
            console.print(f"[bold]toka {name}[/] \\[key=value ...] \\[--help]    {summary}")
    console.print("\n--show prints the flags as YAML and leaves. Booleans are T or F.\n")
    table = Table(box=None, pad_edge=False)
    for heading in ("flag", "default", "unit", "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "flag")
    for spec in dataclasses.fields(flags_type):
        names = " ".join((spec.name, *(f"(or {alias})" for alias in spec.metadata["aliases"])))
        default = (
            {True: "T", False: "F"}.get(spec.default, str(spec.default))
            if isinstance(spec.default, bool)
            else str(spec.default)
        )
        choices = spec.metadata["choices"]
        meaning = spec.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")
        table.add_row(*(_plain(cell) for cell in (names, default, spec.metadata["unit"], meaning)))
    console.print(table)


def _plain(cell: str) -> str:
    return cell.replace("[", "\\[")


def _show(flags: Any) -> None:
    if isinstance(flags, Config):
        flags.check()
    fields = dataclasses.asdict(flags)
    for name in ("api_key", "admin_key"):
        if fields.get(name):
            fields[name] = "(hidden)"
    print(yaml.safe_dump(fields, sort_keys=False), end="")
