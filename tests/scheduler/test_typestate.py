"""mypy refuses what a request's lifecycle does not allow: six wrong programs, six errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

RIGHT = """
from toka.messages import FinishReason
from toka.scheduler.block_pool import BlockPool
from toka.scheduler.request import Draining, Finished, Running, Waiting
from toka.scheduler.request_table import RequestTable

def right(waiting: Waiting, table: RequestTable, pool: BlockPool) -> Finished | Waiting:
    running = waiting.admit(3)
    del waiting
    draining = running.preempt(7)
    del running
    draining = draining.finish(FinishReason.STOP)
    return draining.settle(7, table, pool)
"""

WRONG = {
    "blocks given back while it runs": """
def wrong(running: Running, table: RequestTable, pool: BlockPool) -> None:
    running.settle(7, table, pool)  # ERROR
""",
    "preempted before it was admitted": """
def wrong(waiting: Waiting) -> None:
    waiting.preempt(7)  # ERROR
""",
    "back to the queue without settling": """
def wrong(running: Running) -> Waiting:
    return running.preempt(7)  # ERROR
""",
    "admitted while it drains": """
def wrong(draining: Draining) -> None:
    draining.admit(3)  # ERROR
""",
    "used after it moved": """
def wrong(waiting: Waiting) -> None:
    running = waiting.admit(3)
    del waiting
    running.preempt(7)
    waiting.abort()  # ERROR
""",
    "revived after its end": """
def wrong(state: Draining | Finished) -> None:
    if isinstance(state, Finished):
        state.settle(7)  # ERROR
""",
}

MYPY_INI = """
[mypy]
strict = True
follow_imports = skip
[mypy-toka,toka.messages,toka.scheduler.*]
follow_imports = silent
"""


def test_mypy_refuses_six_wrong_programs(tmp_path: Path) -> None:
    header = RIGHT.split("def right")[0]
    (tmp_path / "right.py").write_text(RIGHT)
    expected = []
    for number, program in enumerate(WRONG.values()):
        source = header + program
        (tmp_path / f"wrong_{number}.py").write_text(source)
        [line] = [i for i, text in enumerate(source.splitlines(), 1) if "# ERROR" in text]
        expected.append((f"wrong_{number}.py", line))
    (tmp_path / "mypy.ini").write_text(MYPY_INI)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "."],
        cwd=tmp_path,
        env={"MYPYPATH": str(Path(__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\w+\.py):(\d+): error:", run.stdout, re.MULTILINE)
    assert [(name, int(line)) for name, line in sorted(found)] == expected, run.stdout + run.stderr
    assert len(expected) == 6


def test_only_settle_and_the_pool_itself_give_blocks_back() -> None:
    room = Path(__file__).parents[2] / "toka" / "scheduler"
    calls = {path.name: path.read_text().count(".release(") for path in room.glob("*.py")}
    assert {name: count for name, count in calls.items() if count} == {"request.py": 1}
