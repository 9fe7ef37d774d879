"""Reads the tensors of a GGUF file under Hugging Face's names; the gguf library dequantises them (to float32)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GgmlType
from torch import Tensor

from toka.errors import ConfigError
from toka.gguf_config import to_hf_config
from toka.gguf_file import GgufFile, GgufTensor
from toka.weights.weight import TensorEntry

_DTYPES: dict[GgmlType, torch.dtype] = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
    GgmlType.Q4_0: torch.float32,
    GgmlType.Q4_1: torch.float32,
    GgmlType.Q5_0: torch.float32,
    GgmlType.Q5_1: torch.float32,
    GgmlType.Q8_0: torch.float32,
    GgmlType.Q4_K: torch.float32,
    GgmlType.Q5_K: torch.float32,
    GgmlType.Q6_K: torch.float32,
}
_GROUP_NUM_ELEMENTS = 1 << 16  # dequantised at once
_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufReader:
    """The tensors of one GGUF file.

    llama.cpp rotates neighbouring pairs of a head in models of its architecture "llama" and stores the rows of q and k in that
    order; they are put back into Hugging Face's order (first halves, then second halves) as they are read.
    """

    def __init__(self, path: Path):
        """Read the file's head. Raises ConfigError (one line) if the file is damaged or holds a type that is not supported."""
        gguf = GgufFile.open(path)
        self._path = path
        self._head_dim = int(to_hf_config(gguf)["head_dim"])
        self._interleaved = gguf.metadata["general.architecture"] == "llama"
        self._stored: dict[str, GgufTensor] = {}
        self._tensors: dict[str, TensorEntry] = {}
        for stored in sorted(gguf.tensors.values(), key=lambda tensor: tensor.offset):
            if stored.type not in _DTYPES:
                known = ", ".join(kind.name for kind in _DTYPES)
                raise ConfigError(
                    f"Tensor {stored.name!r} in {path} is of type {stored.type.name} (supported: {known})."
                )
            name = _hf_name(stored.name)
            self._stored[name] = stored
            self._tensors[name] = TensorEntry(stored.shape, stored.type.name, _DTYPES[stored.type], path)

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return self._tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        stored = self._stored[name]
        return _to_tensor(self._rows(name, start, stop), stored.type).reshape(stop - start, *stored.shape[1:])

    def read_blocks(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 as the file stores them: uint8 [stop - start, bytes of a row]."""
        return torch.from_numpy(np.ascontiguousarray(self._rows(name, start, stop)))

    def _rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        stored = self._stored[name]
        if self._interleaved and name.rpartition(".")[0].endswith(("self_attn.q_proj", "self_attn.k_proj")):
            return self._deinterleaved(stored, start, stop)
        return self._raw_rows(stored, start, stop)

    def _deinterleaved(self, stored: GgufTensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start .. stop - 1 in Hugging Face's order: of each head, the even rows of the file and then the odd ones."""
        head_dim = self._head_dim
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        heads = self._raw_rows(stored, first, min(last, stored.shape[0])).reshape(
            -1, head_dim // 2, 2, stored.row_num_bytes
        )
        return heads.swapaxes(1, 2).reshape(-1, stored.row_num_bytes)[start - first : stop - first]

    def _raw_rows(self, stored: GgufTensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows as they are in the file; uint8 [stop - start, row_num_bytes]. Read, not mapped: it does not stay resident."""
        size = stored.row_num_bytes
        raw = np.fromfile(self._path, np.uint8, count=(stop - start) * size, offset=stored.offset + start * size)
        if raw.size != (stop - start) * size:
            raise ConfigError(f"{self._path} was cut short while it was read (tensor {stored.name!r}).")
        return raw.reshape(stop - start, size)


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that is not known stays as it is, and the loader reports it."""
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    match = _BLOCK_NAME.fullmatch(name)
    if match and match[2] in _BLOCK_NAMES:
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    return name


def _to_tensor(raw: npt.NDArray[np.uint8], kind: GgmlType) -> Tensor:
    raw = np.ascontiguousarray(raw)
    if kind in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
        return torch.from_numpy(raw).view(_DTYPES[kind])
    return torch.from_numpy(_dequantised(raw, kind))


def _dequantised(raw: npt.NDArray[np.uint8], kind: GgmlType) -> npt.NDArray[np.float32]:
    """The same as the library's `dequantize`, which does 16 rows at a time: at a group of blocks that fills the cache, half the time."""
    block_size, block_num_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_num_bytes)
    values = np.empty((len(blocks), block_size), np.float32)
    dequantize_blocks = getattr(quants, kind.name).dequantize_blocks
    step = _GROUP_NUM_ELEMENTS // block_size
    for start in range(0, len(blocks), step):
        values[start : start + step] = dequantize_blocks(blocks[start : start + step])
    return values
