from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from toka.compile import artifact
from toka.compile.artifact import Artifact, DamagedArtifactError
from toka.errors import ConfigError

IDENTITY = {"torch": "2.13.0", "dtype": "float32", "model.num_layers": "30"}


def written(directory: Path, identity: dict[str, str] = IDENTITY) -> Path:
    with artifact.publish(directory) as building:
        (building / "block.pt2").write_bytes(b"code")
        artifact.write_manifest(building, identity, (), (), (), {"compiler": "c++"})
    return directory


def test_what_is_built_is_what_is_read(build: Callable[[str], Artifact]) -> None:
    made = build("made")
    manifest = made.manifest
    assert [entry.file for entry in manifest.regions] == ["block.pt2"] and manifest.libraries == ("kernels.so",)
    assert {kernel.op for kernel in manifest.kernels} == {"write_kv"}
    assert manifest.files.keys() == {"block.pt2", "kernels.so"}
    assert artifact.open_given(made.directory, manifest.identity).manifest == manifest


@pytest.mark.parametrize("field", IDENTITY)
def test_the_field_that_differs_is_named(tmp_path: Path, field: str) -> None:
    directory = written(tmp_path / "a")
    with pytest.raises(
        ConfigError, match=rf"artifact=.*: {field} differs: .* made for {IDENTITY[field]}, .* has other"
    ):
        artifact.open_given(directory, {**IDENTITY, field: "other"})


def test_a_field_that_only_one_side_knows_is_named(tmp_path: Path) -> None:
    directory = written(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"page_size differs: it was made for nothing, this start has 16"):
        artifact.open_given(directory, {**IDENTITY, "page_size": "16"})


def test_each_field_makes_another_key() -> None:
    keys = {artifact.key_of({**IDENTITY, field: "other"}) for field in IDENTITY}
    assert len(keys | {artifact.key_of(IDENTITY)}) == len(IDENTITY) + 1
    assert artifact.key_of(dict(reversed(IDENTITY.items()))) == artifact.key_of(IDENTITY)


def test_a_damaged_file_is_found_and_named(tmp_path: Path) -> None:
    directory = written(tmp_path / "a")
    (directory / "block.pt2").write_bytes(b"cod3")
    with pytest.raises(DamagedArtifactError, match=r"block\.pt2 is damaged"):
        artifact.open_artifact(directory)
    (directory / "block.pt2").unlink()
    with pytest.raises(ConfigError, match=r"artifact=.*block\.pt2 cannot be read.*toka compile out=DIR"):
        artifact.open_given(directory, IDENTITY)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"identity": {}})])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, text: str) -> None:
    directory = written(tmp_path / "a")
    (directory / "manifest.json").write_text(text)
    with pytest.raises(DamagedArtifactError, match=r"manifest\.json cannot be read"):
        artifact.open_artifact(directory)


def test_no_directory_is_an_error_of_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"artifact=.*nowhere"):
        artifact.open_given(tmp_path / "nowhere", IDENTITY)


def test_the_first_of_two_builders_wins_and_nothing_is_left_over(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with artifact.publish(target) as slower:
        (slower / "block.pt2").write_bytes(b"slower")
        written(target)
        artifact.write_manifest(slower, IDENTITY, (), (), (), {})
    assert (target / "block.pt2").read_bytes() == b"code"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), artifact.publish(tmp_path / "a") as building:
        (building / "block.pt2").write_bytes(b"half")
        raise RuntimeError("the compiler died")
    assert not list(tmp_path.iterdir())


def test_a_copy_is_whole_and_replaces_an_older_one_only(tmp_path: Path) -> None:
    made = artifact.open_artifact(written(tmp_path / "a"))
    artifact.copy_artifact(made, tmp_path / "b")
    artifact.copy_artifact(made, tmp_path / "b")
    assert dataclasses.replace(artifact.open_artifact(tmp_path / "b"), directory=made.directory) == made
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"out=.*holds no artifact"):
        artifact.copy_artifact(made, tmp_path / "c")
    assert (tmp_path / "c" / "thesis.tex").exists()


def test_sources_count_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1")
    before = artifact.sources_fingerprint([tmp_path / "one.py"])
    assert artifact.sources_fingerprint([tmp_path / "one.py"]) == before
    (tmp_path / "one.py").write_text("x = 2")
    assert artifact.sources_fingerprint([tmp_path / "one.py"]) != before
