"""What `model=` and `tokenizer=` may name, what is said when nothing is there, and that torch is not needed for any of it."""

import json
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from toka.errors import ConfigError
from toka.model_source import ModelSource, locate, read_hf_config


@pytest.fixture
def hf_dir(tmp_path):
    directory = tmp_path / "tiny-llama"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    (directory / "model.safetensors").touch()
    return directory


@pytest.fixture
def gguf_path(tmp_path):
    path = tmp_path / "Tiny.Q4_0.gguf"
    path.touch()
    return path


def refused(*arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        locate(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_directory(hf_dir, tmp_path):
    assert locate(str(hf_dir), None, tmp_path) == ModelSource("hf_dir", hf_dir, hf_dir, "tiny-llama")


def test_relative_directory_is_named_after_itself(hf_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(hf_dir)
    assert locate(".", None, tmp_path).name == "tiny-llama"


def test_gguf_file(gguf_path, tmp_path):
    assert locate(str(gguf_path), None, tmp_path) == ModelSource("gguf", gguf_path, gguf_path, "Tiny.Q4_0")


def test_tokenizer_of_its_own(hf_dir, gguf_path, tmp_path):
    (hf_dir / "tokenizer.json").touch()
    assert locate(str(gguf_path), str(hf_dir), tmp_path).tokenizer_path == hf_dir
    assert locate(str(gguf_path), str(hf_dir / "tokenizer.json"), tmp_path).tokenizer_path == hf_dir / "tokenizer.json"
    assert locate(str(hf_dir), str(gguf_path), tmp_path).tokenizer_path == gguf_path
    for name in (str(hf_dir / "model.safetensors"), "/nowhere/at/all"):
        assert f"tokenizer={name}" in refused(str(hf_dir), name, tmp_path)


@pytest.mark.parametrize("name", ["nothing", "./a/b", "/nowhere/model", "a/b/c", "~/nothing", "nothing.gguf", "owner/"])
def test_no_such_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(name, None, tmp_path)
    assert f"model={name}" in message
    assert "model=PATH" in message


def test_a_file_that_is_no_gguf(hf_dir, tmp_path):
    assert "no .gguf" in refused(str(hf_dir / "model.safetensors"), None, tmp_path)


def test_directory_without_config(hf_dir, tmp_path):
    (hf_dir / "config.json").unlink()
    assert "no config.json" in refused(str(hf_dir), None, tmp_path)


def test_directory_with_a_pickle_only(hf_dir, tmp_path):
    (hf_dir / "model.safetensors").rename(hf_dir / "pytorch_model.bin")
    message = refused(str(hf_dir), None, tmp_path)
    assert "pickled" in message
    assert "safetensors" in message


def test_directory_without_weights(hf_dir, tmp_path):
    (hf_dir / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(str(hf_dir), None, tmp_path)


def test_hub_id_fetches_no_pickle(hf_dir, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(name=name, **kw) or str(hf_dir)
    )
    source = locate("owner/model", None, tmp_path, offline=True)
    assert source == ModelSource("hf_dir", hf_dir, hf_dir, "owner/model")
    assert asked["name"] == "owner/model"
    assert asked["local_files_only"] is True
    assert asked["ignore_patterns"] == ["consolidated*.safetensors"]
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"}


@pytest.mark.parametrize(
    ("make_error", "words"),
    [
        (lambda response: RepositoryNotFoundError("no\nsuch", response=response), "has no repository of that name"),
        (lambda response: HfHubHTTPError("bad\ngateway", response=response), "status 502"),
        (lambda response: LocalEntryNotFoundError("not\ncached"), "out of reach"),
        (lambda response: RuntimeError("cut off\nsomewhere"), "cut off"),
    ],
)
def test_hub_failures_are_one_line(make_error, words, tmp_path, monkeypatch):
    class Response:
        status_code, headers, request = 502, {}, None

    def fail(*_, **__):
        raise make_error(Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused("owner/model", None, tmp_path)
    assert words in message
    assert "model=owner/model" in message


def test_hub_id_offline_and_not_cached(tmp_path):
    """The real client, which must not touch the network."""
    assert "switched off" in refused("no-such-owner/no-such-model", None, tmp_path, offline=True)


@pytest.mark.parametrize(
    ("stated", "generation", "merged"),
    [(2, None, [2]), (2, {"eos_token_id": [5, 2]}, [5, 2]), ([1, 2], {"eos_token_id": 3}, [3, 1, 2]), (None, {}, [])],
)
def test_end_tokens_are_merged(hf_dir, stated, generation, merged):
    (hf_dir / "config.json").write_text(json.dumps({"eos_token_id": stated}))
    if generation is not None:
        (hf_dir / "generation_config.json").write_text(json.dumps(generation))
    assert read_hf_config(ModelSource("hf_dir", hf_dir, hf_dir, ""))["eos_token_id"] == merged


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"eos_token_id": "</s>"}', b"\xff\xfe"])
def test_malformed_json(hf_dir, name, content):
    (hf_dir / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_hf_config(ModelSource("hf_dir", hf_dir, hf_dir, ""))
    assert str(hf_dir) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_of_the_default_model(default_model):
    assert default_model.name == "SmolLM2-135M-Instruct"
    config = read_hf_config(default_model)
    assert (config["model_type"], config["vocab_size"], config["eos_token_id"]) == ("llama", 49152, [2])


def test_needs_no_torch():
    program = "import sys, toka.model_source, toka.gguf_file, toka.placement, toka.models.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
