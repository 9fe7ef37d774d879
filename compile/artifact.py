"""A model's compiled code in a directory, and what it was made for (floor 4).

    DIR/manifest.json         identity, checksums of the files, how each region is called, which kernels were chosen and why
    DIR/<region>.pt2          one region, compiled ahead of time; weights are not in it
    DIR/<kernel libraries>    what the regions call

The identity names everything that shapes the code: the sources that make the graph, the passes, the model's shape, dtypes and
formats, torch, the processor. It is known before anything is traced, so a start that finds its artifact neither traces nor
compiles. A directory appears whole or not at all (it is made beside its place and renamed), so processes that start together, or
one that dies half-way, harm nobody.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toka.compile.region_graph import Recipe
from toka.errors import ConfigError

FORMAT_VERSION = "2"
_MANIFEST = "manifest.json"

Identity = Mapping[str, str]
"""Field → value. Two artifacts are interchangeable exactly when all fields are equal."""


class DamagedArtifactError(Exception):
    """A file of an artifact is missing or not what the manifest says."""


@dataclass(frozen=True)
class RegionEntry:
    """One compiled region. file: its name in the directory. recipes: its parameters, in order. seconds: what compiling took."""

    name: str
    file: str
    recipes: tuple[Recipe, ...]
    seconds: float


@dataclass(frozen=True)
class KernelEntry:
    """What an operator became. reason: for people."""

    op: str
    overload: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """identity: see Identity. made_with: further facts for people. files: name → SHA-256 in hex. libraries: kernel libraries
    among the files."""

    identity: Identity
    made_with: Mapping[str, str]
    regions: tuple[RegionEntry, ...]
    kernels: tuple[KernelEntry, ...]
    libraries: tuple[str, ...]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files are there and whole."""

    directory: Path
    manifest: Manifest


def environment(device: torch.device) -> dict[str, str]:
    """The part of an identity that this process, machine and device decide."""
    return {
        **(_cuda_environment(device) if device.type == "cuda" else {}),
        "format": FORMAT_VERSION,
        "torch": torch.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": _cpu_flags(),
    }


def _cuda_environment(device: torch.device) -> dict[str, str]:
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "gpu": f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors)",
    }


def sources_fingerprint(paths: Iterator[Path] | list[Path]) -> str:
    """Hex digest over source files: names and contents, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths, key=lambda path: (path.parent.name, path.name)):
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(identity: Identity) -> str:
    """The name of the directory in which the cache keeps this identity's artifact."""
    return hashlib.blake2b(json.dumps(dict(sorted(identity.items()))).encode(), digest_size=16).hexdigest()


def open_artifact(directory: Path) -> Artifact:
    """Read an artifact and check its files. Raises DamagedArtifactError, naming the file."""
    path = directory / _MANIFEST
    try:
        manifest = _manifest_from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifactError(f"{path} cannot be read ({error})") from error
    for name, digest in manifest.files.items():
        try:
            found = _digest(directory / name)
        except OSError as error:
            raise DamagedArtifactError(f"{directory / name} cannot be read ({error.strerror})") from error
        if found != digest:
            raise DamagedArtifactError(f"{directory / name} is damaged: its checksum is not that of the manifest")
    return Artifact(directory, manifest)


def open_given(directory: Path, identity: Identity) -> Artifact:
    """The artifact that the user names. Raises ConfigError, naming what is wrong, unless it is whole and made for this identity."""
    try:
        artifact = open_artifact(directory)
    except DamagedArtifactError as error:
        raise ConfigError(f"artifact={directory}: {error}; make it again with `toka compile out=DIR`") from error
    theirs = artifact.manifest.identity
    for field in sorted({*identity, *theirs}):
        if identity.get(field) != theirs.get(field):
            made, here = (_short(values.get(field)) for values in (theirs, identity))
            raise ConfigError(
                f"artifact={directory}: {field} differs: it was made for {made}, this start has {here}. "
                "Set the same flags, or make it again with `toka compile out=DIR`"
            )
    return artifact


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return (
        value if len(value) <= 80 else f"{value[:60]}... ({hashlib.blake2b(value.encode(), digest_size=4).hexdigest()})"
    )


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes `target`'s place when the block ends well; if another process was first, its result stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    building.mkdir()
    try:
        yield building
        try:
            building.rename(target)
        except OSError:
            if not (target / _MANIFEST).exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def discard(directory: Path) -> None:
    """Take a damaged artifact out of the way: renamed first, so that nobody meets it half removed."""
    grave = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    try:
        directory.rename(grave)
    except FileNotFoundError:
        return  # another process was quicker
    shutil.rmtree(grave, ignore_errors=True)


def copy_artifact(artifact: Artifact, target: Path) -> None:
    """Copy it to a place of the user's. Raises ConfigError if something else is there."""
    if target.exists() and any(target.iterdir()) and not (target / _MANIFEST).exists():
        raise ConfigError(f"out={target}: is not empty and holds no artifact; choose another directory")
    if target.exists():
        discard(target)
    with publish(target) as building:
        shutil.copytree(artifact.directory, building, dirs_exist_ok=True)


def write_manifest(
    directory: Path,
    identity: Identity,
    regions: tuple[RegionEntry, ...],
    kernels: tuple[KernelEntry, ...],
    libraries: tuple[str, ...],
    made_with: Mapping[str, str],
) -> None:
    """Finish an artifact whose files are all in `directory`."""
    files = {path.name: _digest(path) for path in sorted(directory.iterdir())}
    manifest = Manifest(identity, made_with, regions, kernels, libraries, files)
    (directory / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def _manifest_from_json(text: str) -> Manifest:
    data = json.loads(text)
    regions = tuple(
        RegionEntry(
            region["name"],
            region["file"],
            tuple(_recipe_from_json(recipe) for recipe in region["recipes"]),
            region["seconds"],
        )
        for region in data["regions"]
    )
    kernels = tuple(KernelEntry(**kernel) for kernel in data["kernels"])
    return Manifest(data["identity"], data["made_with"], regions, kernels, tuple(data["libraries"]), data["files"])


def _recipe_from_json(data: dict[str, Any]) -> Recipe:
    return Recipe(tuple(map(tuple, data["operands"])), data["packing"], tuple(data["constants"]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpu_flags() -> str:
    """The instruction sets of the first processor (the code is compiled for exactly these), or its name where /proc is missing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    values = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in values.items()}
    return found.get("flags") or found.get("Features") or platform.processor()
