"""Work in forked processes: all of it is done, errors come back, and nothing is left running."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from toka.compile import forked
from toka.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux only")


def write(path: Path) -> None:
    path.write_text(str(os.getpid()))


def refuse() -> None:
    raise ConfigError("flag=3: is too large")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("max_processes", [1, 2, 8])
def test_every_call_is_made_once_in_a_process_of_its_own(tmp_path: Path, max_processes: int) -> None:
    paths = [tmp_path / str(i) for i in range(5)]
    ended = dict(forked.run_forked([partial(write, path) for path in paths], max_processes))
    assert sorted(ended) == list(range(5)) and min(ended.values()) > 0
    assert len({path.read_text() for path in paths} | {str(os.getpid())}) == 6


def test_no_more_than_so_many_run_at_once() -> None:
    began = time.perf_counter()
    ended = [index for index, _ in forked.run_forked([partial(time.sleep, 0.2)] * 4, 2)]
    assert sorted(ended) == [0, 1, 2, 3] and time.perf_counter() - began >= 0.4


def test_what_the_user_can_mend_comes_back_as_it_was() -> None:
    with pytest.raises(ConfigError, match="flag=3: is too large"):
        list(forked.run_forked([refuse], 1))


def test_any_other_error_comes_back_with_its_traceback_and_the_rest_is_stopped(tmp_path: Path) -> None:
    def long_work() -> None:
        write(tmp_path / "pid")
        time.sleep(60)

    def fail() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        raise ZeroDivisionError("in the child")

    with pytest.raises(RuntimeError, match="ZeroDivisionError: in the child"):
        list(forked.run_forked([long_work, fail], 2))
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_killed_child_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with -9"):
        list(forked.run_forked([lambda: os.kill(os.getpid(), 9)], 1))


def test_in_turn_is_this_process(tmp_path: Path) -> None:
    assert [index for index, _ in forked.run_in_turn([partial(write, tmp_path / "pid")])] == [0]
    assert (tmp_path / "pid").read_text() == str(os.getpid())
