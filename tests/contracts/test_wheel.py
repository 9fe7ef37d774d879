"""A wheel built from the sources holds every package, module and kernel source, though three folders stand outside `toka/`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAPPED = {"compile": "toka/compile", "kernels": "toka/kernels", "warmup": "toka/warmup", "toka": "toka"}


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    packed = set(zipfile.ZipFile(next(tmp_path.glob("toka-*.whl"))).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", *MAPPED], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {f"{MAPPED[folder]}/{rest}" for folder, _, rest in (name.partition("/") for name in tracked)}
    assert expected
    assert expected <= packed, sorted(expected - packed)
