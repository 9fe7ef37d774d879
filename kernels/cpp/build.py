"""Builds the C++ kernels once for this machine and loads them into torch.

The library lies at cache_dir/kernels/<fingerprint>/libtoka_kernels-<fingerprint>.so. The fingerprint covers everything that
decides its contents: sources, flags, compiler and its version, torch's version, the CPU. A build happens in a directory of its
own and is moved into place whole, so that processes that start together, or one that dies half-way, harm nobody.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType

import torch

import toka.kernels.ops  # noqa: F401  (defines the operators that the library implements)
from toka.errors import ConfigError

SOURCE_DIR = Path(__file__).parent
LIBRARY_PREFIX = "libtoka_kernels-"

_COMPILERS = ("c++", "g++", "clang++")
_TORCH_INCLUDE = Path(torch.__file__).parent / "include"
_TORCH_LIB = Path(torch.__file__).parent / "lib"
# The stable headers of this torch version and later: the same code then runs on every torch that toka allows.
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020B000000000000"

# Vectors are written by hand, so most files gain nothing from -O3, which takes a third longer to compile; these gain 5 %.
_EXTRA_FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(
        ("float_blocks.cpp", "linear_quantised.cpp", "paged_attention.cpp", "encoder_attention.cpp"), ("-O3",)
    )
)

Progress = Callable[[str], None]

log = logging.getLogger(__name__)


def build(
    cache_dir: Path, compiler: str | None = None, on_progress: Progress | None = None, source_dir: Path = SOURCE_DIR
) -> Path:
    """Compile the kernels unless the cache has them; returns the library's path.

    compiler: a command or path; None = the first of c++, g++, clang++ on PATH. on_progress gets one line per phase.
    Raises ConfigError if there is no compiler, or if it refuses the sources.
    """
    command = find_compiler(compiler)
    flags = compile_flags()
    name = fingerprint(command, flags, source_dir)
    target = cache_dir / "kernels" / name
    library = target / f"{LIBRARY_PREFIX}{name}.so"
    if library.exists():
        return library
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as folder:
        workplace = Path(folder)
        finished = workplace / "finished"
        finished.mkdir()
        _compile(command, flags, source_dir, workplace, finished / library.name, on_progress or (lambda line: None))
        _move_into_place(finished, target)
    return library


def load(library: Path) -> None:
    """Give `torch.ops.toka_cpp.*` their implementation; loading the same library, or a copy of it, again does nothing.

    Raises ConfigError if this process already runs another build, which cannot be taken back, or if the file is no library of
    this machine's.
    """
    loaded = [Path(path).name for path in torch.ops.loaded_libraries if Path(path).name.startswith(LIBRARY_PREFIX)]
    if library.name in loaded:
        return
    if loaded:
        raise ConfigError(
            f"this process runs the kernels of {loaded[0]} and cannot load {library}: start a new process"
        )
    try:
        torch.ops.load_library(str(library.resolve()))
    except OSError as error:
        raise ConfigError(f"the kernel library {library} cannot be loaded: {error}") from error


def find_compiler(compiler: str | None) -> str:
    """The compiler's path. Raises ConfigError if there is none."""
    for candidate in (compiler,) if compiler else _COMPILERS:
        path = shutil.which(candidate)
        if path is not None:
            return path
    wanted = f"the C++ compiler {compiler!r} is not there" if compiler else "no C++ compiler on PATH"
    raise ConfigError(f"{wanted}: install g++ (for example `apt install g++`), or run with torch_compile=F.")


def compile_flags() -> tuple[str, ...]:
    """Flags for every source file; the library is for this machine's CPU only."""
    native = "-mcpu=native" if platform.machine().lower() in ("aarch64", "arm64") else "-march=native"
    return (
        "-std=c++17",
        "-O2",
        "-fpeel-loops",
        native,
        "-fPIC",
        "-fvisibility=hidden",
        _STABLE_ABI,
        f"-isystem{_TORCH_INCLUDE}",
    )


def sources_fingerprint(source_dir: Path = SOURCE_DIR) -> str:
    """Sixteen hex digits over sources and flags: what the library is, whichever compiler made it."""
    digest = hashlib.sha256()
    for flag in compile_flags():
        digest.update(flag.replace(str(_TORCH_INCLUDE), "torch").encode() + b"\0")
    _digest_files(digest, source_dir)
    return digest.hexdigest()[:16]


def fingerprint(compiler: str, flags: tuple[str, ...], source_dir: Path) -> str:
    """Sixteen hex digits over everything that the library depends on."""
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for text in (compiler, version, *flags, torch.__version__, platform.platform(), _cpu_description()):
        digest.update(text.encode() + b"\0")
    _digest_files(digest, source_dir)
    return digest.hexdigest()[:16]


def _digest_files(digest: hashlib._Hash, source_dir: Path) -> None:
    for path in _files(source_dir, "*.h", "*.cpp"):
        flags = " ".join(_flags_of(path, ()))
        digest.update(f"{path.name}\0{flags}\0".encode() + path.read_bytes() + b"\0")


def _files(source_dir: Path, *patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(source_dir.glob(pattern))


def _cpu_description() -> str:
    """Model and instruction sets of the first CPU, as far as the system tells."""
    try:
        first_cpu = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    keys = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in first_cpu.splitlines() if line.startswith(keys))


def _flags_of(source: Path, flags: tuple[str, ...]) -> tuple[str, ...]:
    return (*flags, *_EXTRA_FLAGS.get(source.name, ()))


def _compile(
    compiler: str, flags: tuple[str, ...], source_dir: Path, workplace: Path, library: Path, on_progress: Progress
) -> None:
    sources = list(_files(source_dir, "*.cpp"))
    objects = [workplace / f"{source.stem}.o" for source in sources]
    on_progress(f"compiling {len(sources)} kernel files with {Path(compiler).name}")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = {
            pool.submit(
                _run, [compiler, *_flags_of(source, flags), "-c", str(source), "-o", str(object_file)], source.name
            ): source
            for source, object_file in zip(sources, objects, strict=True)
        }
        for num_done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            on_progress(f"compiled {jobs[job].name} ({num_done} of {len(sources)})")
    link = [compiler, "-shared", *map(str, objects), "-o", str(library), f"-L{_TORCH_LIB}", "-ltorch_cpu", "-lc10"]
    _run(link, "the kernel library")
    on_progress("kernels ready")


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    log.error("%s:\n%s", " ".join(command), done.stderr)
    lines = (
        [line for line in done.stderr.splitlines() if "error" in line.lower()]
        or done.stderr.splitlines()
        or ["no message"]
    )
    raise ConfigError(f"{command[0]} could not build {what} (status {done.returncode}): {lines[0][:300]}")


def _move_into_place(finished: Path, target: Path) -> None:
    try:
        os.rename(finished, target)
    except OSError:
        if not target.exists():
            raise
        # Another process built the same at the same time; one of the two is as good as the other.
