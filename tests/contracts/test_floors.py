"""Imports go down the floors only, siblings are blind to each other, and the torch-free floors stay so (ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Package or module below `toka` → floor. A module may import modules of lower floors, and its own package.
FLOORS = {
    "__main__": 10,
    "cli": 9,
    "client": 8,
    "server": 8,
    "llm": 8,
    "engine": 7,
    "warmup": 6,
    "runner": 5,
    "models": 4,
    "compile": 4,
    "scheduler": 4,
    "text": 4,
    "weights": 3,
    "kernels": 2,
    "parallel": 2,
    "params": 1,
    "messages": 1,
    "plan": 1,
    "placement": 1,
    "pooling": 1,
    "model_source": 1,
    "embedded_model": 1,
    "gguf_file": 1,
    "gguf_config": 1,
    "config": 0,
    "devices": 0,
    "errors": 0,
    "metrics": 0,
    "log": 0,
}
VALUE_FLOORS = (0, 1)  # the small value modules at the bottom may use each other
TORCH_FREE = {
    "cli",
    "client",
    "server",
    "scheduler",
    "text",
    *(name for name, floor in FLOORS.items() if floor in VALUE_FLOORS),
}


def rooms() -> dict[str, list[Path]]:
    """Room → its source files, wherever its folder stands."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "toka").glob("*.py")):
        if path.stem != "__init__":
            found[path.stem] = [path]
    for folder in [*(ROOT / "toka").iterdir(), *(ROOT / name for name in ("compile", "kernels", "warmup"))]:
        if folder.is_dir() and (files := sorted(folder.rglob("*.py"))):
            found[folder.name] = files
    return found


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, and whether only for type checking."""
    tree = ast.parse(path.read_text())
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            guarded.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in guarded


def test_every_room_has_a_floor() -> None:
    assert not set(rooms()) - set(FLOORS)


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_go_down(room: str) -> None:
    wrong = []
    for path in rooms()[room]:
        for name, _ in imports_of(path):
            parts = name.split(".")
            if parts[0] != "toka" or len(parts) < 2 or parts[1] == room or parts[1] not in FLOORS:
                continue
            lower = FLOORS[parts[1]] < FLOORS[room] or FLOORS[parts[1]] == FLOORS[room] in VALUE_FLOORS
            if not lower:
                wrong.append(f"{path.relative_to(ROOT)} imports toka.{parts[1]}")
    assert not wrong


TORCH_FREE_PART = "transformers.utils.chat_parsing"


@pytest.mark.parametrize("room", sorted(TORCH_FREE & set(rooms())))
def test_no_torch(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in rooms()[room]
        for name, type_checking in imports_of(path)
        if name.split(".")[0] in ("torch", "transformers", "triton") and not type_checking
        if not name.startswith(f"{TORCH_FREE_PART}.")
    ]
    assert not wrong


def test_that_part_of_transformers_loads_no_torch() -> None:
    code = f"import sys, {TORCH_FREE_PART}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_api_process_never_loads_torch() -> None:
    code = "import sys, toka.cli, toka.server.launch; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_config_reads_the_environment() -> None:
    readers = {
        room
        for room, files in rooms().items()
        for path in files
        if "os.environ" in path.read_text() or "os.getenv" in path.read_text()
    }
    assert readers <= {"config"}


def test_no_room_without_a_meaning() -> None:
    vague = {"utils", "helpers", "common", "base", "manager", "misc"}
    assert not [path for files in rooms().values() for path in files if path.stem in vague]
