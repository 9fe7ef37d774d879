"""One step of an engine that generates nothing: from token ids to one vector a prompt, as regions for the compiler (floor 5).

    decoder   begin ─► layer × (num_layers - 1) ─► last (the last layer, the final norm, pooling)
    encoder   begin ─► layer × num_layers ─► pool (pooling, the classification head where there is one)

A decoder's `begin` and `layer` regions are those of generation, and so are its chunks and its KV cache. An encoder's step holds prompts
whole. What is *sampled* in a step are the rows whose prompts end in it: S of them have a vector, float32.

Legend: T tokens, R rows, S rows whose vectors are wanted, M rows of the request table, C hidden size, L labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import toka.kernels.ops  # noqa: F401 (registers torch.ops.toka)
from toka.compile.region_graph import RowSelection
from toka.compile.step_graph import Call, Region, StepGraph, TensorSpec
from toka.models.decoder import CausalLM, DecoderLayer
from toka.models.encoder import Encoder, EncoderLayer
from toka.models.inputs import ForwardInputs
from toka.models.rope import Rope
from toka.pooling import Mode, Pooling
from toka.runner.step_program import (
    build_step_graph,
    calls_of,
    last_layer,
    layer_inputs,
    model_name,
    region_of,
    regions_before_last,
)

VECTORS = "vectors"
"""The output of a pooling step."""

_INT = torch.int32
_SAMPLES = (
    ("sample_index", TensorSpec(_INT, ("S",))),
    ("sample_rows", TensorSpec(_INT, ("S",))),
    ("sample_seq_lens", TensorSpec(_INT, ("S",))),
)


def graph_of(model: CausalLM | Encoder, pooling: Pooling | None, dtype: torch.dtype, block_size: int) -> StepGraph:
    """The step of this model, which may be on the meta device. pooling: None = it generates. dtype: of activations and KV cache."""
    if isinstance(model, Encoder):
        assert pooling is not None, "encoders generate nothing"
        return _encoder_graph(model, pooling.mode, dtype)
    if pooling is None:
        return build_step_graph(model, dtype, block_size)
    return _decoder_graph(model, pooling.mode, dtype, block_size)


class Pool(nn.Module):
    """Hidden states of the step's tokens → a vector for each row whose prompt ends in it, float32 [S, C].

    mean: sums are kept per row on the device, so that a prompt may come in chunks.
    """

    def __init__(self, mode: Mode):
        super().__init__()
        self._mode = mode

    def forward(
        self,
        hidden_TC: Tensor,
        rows_R: Tensor,
        query_start: Tensor,
        seq_lens_R: Tensor,
        sample_index_S: Tensor,
        sample_rows_S: Tensor,
        sample_seq_lens_S: Tensor,
        *sums: Tensor,
    ) -> Tensor:
        if self._mode == "mean":
            [sums_MC] = sums
            torch.ops.toka.sum_tokens(hidden_TC, rows_R, query_start, seq_lens_R, sums_MC)
            return sums_MC[sample_rows_S.clamp(min=0)] / sample_seq_lens_S.clamp(min=1).unsqueeze(-1)
        if self._mode == "cls":  # the prompt is in this step from its first token on
            sample_index_S = sample_index_S - (sample_seq_lens_S - 1).clamp(min=0)
        return hidden_TC[sample_index_S].to(torch.float32)


def _sums(model: CausalLM | Encoder, mode: Mode) -> tuple[tuple[str, TensorSpec], ...]:
    """The further input of mean pooling."""
    return (("pooled_sums", TensorSpec(torch.float32, ("M", model.spec.hidden_size))),) if mode == "mean" else ()


# -------------------------------------------------------------------------------------------------------------- decoder


class LastPooled(nn.Module):
    """The last layer, the final norm, pooling."""

    def __init__(self, model: CausalLM, layer: DecoderLayer, mode: Mode):
        super().__init__()
        self.layer, self.norm = layer, model.norm
        self._mode, self._pool = mode, Pool(mode)

    def forward(
        self,
        hidden_TC: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        block_table_MW: Tensor,
        rows_R: Tensor,
        query_start: Tensor,
        seq_lens_R: Tensor,
        shared_groups_G5: Tensor,
        shared_members_N: Tensor,
        shared_lens_X: Tensor,
        sample_query_start: Tensor,
        sample_index_S: Tensor,
        *samples: Tensor,
    ) -> tuple[Tensor]:
        shared = (shared_groups_G5, shared_members_N, shared_lens_X)
        inputs = ForwardInputs(positions_T, slots_T, block_table_MW, rows_R, query_start, seq_lens_R, *shared)
        hidden_TC = self.layer(hidden_TC, Rope(cos_TF, sin_TF), inputs, (key_cache, value_cache))
        if (
            self._mode == "last"
        ):  # selected before the norm, so that the compiler drops what other tokens need not compute
            return (self.norm(hidden_TC[sample_index_S]).to(torch.float32),)
        return (self._pool(self.norm(hidden_TC), rows_R, query_start, seq_lens_R, sample_index_S, *samples),)


def _decoder_graph(model: CausalLM, mode: Mode, dtype: torch.dtype, block_size: int) -> StepGraph:
    starts = ("sample_query_start", TensorSpec(_INT, ("P",)))  # P = S + 1
    inputs = (*layer_inputs(model, dtype, block_size), starts, *_SAMPLES, *_sums(model, mode))
    selection = RowSelection("sample_index", "sample_rows", "sample_query_start", "sample_seq_lens")
    last = LastPooled(model, last_layer(model), mode)
    regions = {
        **regions_before_last(model, dtype, block_size),
        "last": region_of(model, "last", last, inputs, num_outputs=1, selection=selection if mode == "last" else None),
    }
    return _graph(regions, calls_of(model, regions, (VECTORS,)))


# -------------------------------------------------------------------------------------------------------------- encoder


class Begin(nn.Module):
    """The embeddings of a step's tokens."""

    def __init__(self, model: Encoder):
        super().__init__()
        self.embeddings = model.embeddings

    def forward(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor]:
        return (self.embeddings(token_ids_T, positions_T),)


class Layer(nn.Module):
    """One encoder layer."""

    def __init__(self, layer: EncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_TC: Tensor, query_start: Tensor) -> tuple[Tensor]:
        return (self.layer(hidden_TC, query_start),)


class PoolAndClassify(nn.Module):
    """Pooling and, where the model has one, the classification head, in the model's dtype."""

    def __init__(self, model: Encoder, mode: Mode, dtype: torch.dtype):
        super().__init__()
        self.head = model.head
        self._pool, self._dtype = Pool(mode), dtype

    def forward(self, hidden_TC: Tensor, *samples: Tensor) -> tuple[Tensor]:
        vectors_SC: Tensor = self._pool(hidden_TC, *samples)
        return (vectors_SC if self.head is None else self.head(vectors_SC.to(self._dtype)).to(torch.float32),)


def _encoder_graph(model: Encoder, mode: Mode, dtype: torch.dtype) -> StepGraph:
    first = model.layers[0]
    assert isinstance(first, EncoderLayer)
    tokens, hidden = TensorSpec(_INT, ("T",)), ("hidden", TensorSpec(dtype, ("T", model.spec.hidden_size)))
    rows, starts = TensorSpec(_INT, ("R",)), ("query_start", TensorSpec(_INT, ("Q",)))  # Q = R + 1
    of_pool = (hidden, ("rows", rows), starts, ("seq_lens", rows), *_SAMPLES, *_sums(model, mode))
    begin = region_of(model, "begin", Begin(model), (("token_ids", tokens), ("positions", tokens)), num_outputs=1)
    layer = region_of(model, "layer", Layer(first), (hidden, starts), num_outputs=1)
    pool = region_of(model, "pool", PoolAndClassify(model, mode, dtype), of_pool, num_outputs=1)

    def call(region: Region, index: int, output: str) -> Call:
        parameters = tuple(model_name(name, index, model) for name in region.parameter_names())
        return Call(region.name, parameters, tuple(name for name, _ in region.inputs), (output,))

    layers = [call(layer, index, "hidden") for index in range(model.spec.num_layers)]
    return _graph(
        {"begin": begin, "layer": layer, "pool": pool},
        (call(begin, 0, "hidden"), *layers, call(pool, 0, VECTORS)),
    )


def _graph(regions: dict[str, Region], calls: tuple[Call, ...]) -> StepGraph:
    """What no call writes is an input."""
    written = {name for call in calls for name in call.outputs}
    inputs = dict.fromkeys(name for call in calls for name in call.inputs if name not in written)
    return StepGraph(tuple(regions.values()), calls, tuple(inputs), (VECTORS,))
