"""Building the C++ kernels: the cache, its key, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from toka.errors import ConfigError
from toka.kernels.cpp import build as kernel_build
from toka.kernels.cpp.build import LIBRARY_PREFIX, build, compile_flags, find_compiler, fingerprint, load

SMALL_SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def small_source_dir(tmp_path: Path) -> Path:
    """A kernel directory that compiles in no time."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "small.cpp").write_text(SMALL_SOURCE)
    return directory


def test_second_build_comes_from_the_cache(tmp_path: Path, small_source_dir: Path) -> None:
    progress: list[str] = []
    library = build(tmp_path, on_progress=progress.append, source_dir=small_source_dir)
    assert library.name.startswith(LIBRARY_PREFIX) and library.exists()
    assert progress[0].startswith("compiling 1 kernel files") and progress[-1] == "kernels ready"
    progress.clear()
    modified = library.stat().st_mtime_ns
    assert build(tmp_path, on_progress=progress.append, source_dir=small_source_dir) == library
    assert not progress and library.stat().st_mtime_ns == modified


def test_whatever_decides_the_contents_changes_the_key(small_source_dir: Path) -> None:
    compiler, flags = find_compiler(None), compile_flags()
    keys = {fingerprint(compiler, flags, small_source_dir), fingerprint(compiler, (*flags, "-g"), small_source_dir)}
    (small_source_dir / "small.cpp").write_text(SMALL_SOURCE + "// changed\n")
    keys.add(fingerprint(compiler, flags, small_source_dir))
    (small_source_dir / "more.h").write_text("")
    keys.add(fingerprint(compiler, flags, small_source_dir))
    assert len(keys) == 4


def test_no_compiler_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'no-such-compiler' is not there: install g\+\+ .*torch_compile=F"):
        build(tmp_path, compiler="no-such-compiler")
    monkeypatch.setattr(kernel_build.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler on PATH: install g\+\+") as raised:
        build(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_broken_source_is_reported_and_leaves_nothing(tmp_path: Path, small_source_dir: Path) -> None:
    (small_source_dir / "small.cpp").write_text("int answer() { return undeclared_name; }\n")
    with pytest.raises(ConfigError, match=r"could not build small\.cpp .*undeclared_name"):
        build(tmp_path, source_dir=small_source_dir)
    assert not list((tmp_path / "kernels").iterdir())


def test_builds_at_the_same_time_agree(tmp_path: Path, small_source_dir: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from toka.kernels.cpp.build import build;"
        "print(build(Path(sys.argv[1]), source_dir=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(small_source_dir)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (library,) = (Path(line) for line in printed)
    assert library.exists() and [entry.name for entry in library.parent.parent.iterdir()] == [library.parent.name]


def test_loser_of_a_race_keeps_the_winners_library(tmp_path: Path) -> None:
    finished, target = tmp_path / "finished", tmp_path / "target"
    for directory, content in ((finished, "mine"), (target, "theirs")):
        directory.mkdir()
        (directory / "library.so").write_text(content)
    kernel_build._move_into_place(finished, target)
    assert (target / "library.so").read_text() == "theirs"


def test_loading_twice_is_loading_once(cpp_kernels: Path) -> None:
    load(cpp_kernels)
    load(cpp_kernels)
