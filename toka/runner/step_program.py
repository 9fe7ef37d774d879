"""One step of a decoder, from token ids to sampled ids, as regions for the compiler (floor 5).

    begin ─► layer × (num_layers - 1) ─► last ┄► adjusted logits ┄► late sample ┄► logprobs

`begin` finds each token's id, rope angles and KV slot, and embeds it; a layer region stands for all layers of its kind; `last` holds the
last layer, the final norm, the LM head and the sampler. Of the last layer most rows need no more than their keys and values: its
module computes them all and then keeps those whose logits are wanted, and the compiler drops the rest (passes/select_rows.py).
The logits come out too, for operators that run behind the steps in which somebody asks for them. `sample` draws once more, for rows
whose tokens a grammar limits: `last` passes these over, for their masks depend on what the step before has drawn and are made while this
one runs; so no step waits for a mask but behind its last product, and steps without masks are what they would be if there were none.
Those whose logits are to be adjusted (penalties, biases, bad words) are drawn there too, from what `adjust_logits` makes of them.
`token_logprobs` finds logprobs, of the model's own logits.

Legend: T tokens, R rows, S samples, M rows of the request table, W blocks a row, B KV blocks, C hidden, D head dim, F = D / 2,
G groups of rows that share a prefix, N members of all groups, X rows that may be members; a step has always as many as there can be.
K masks, L slots of the KV cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toka.compile.region_graph import RowSelection
from toka.compile.step_graph import Call, OperatorCall, Region, StepGraph, TensorSpec
from toka.models.decoder import CausalLM, DecoderLayer
from toka.models.encoder import Encoder
from toka.models.encoder_spec import EncoderSpec
from toka.models.inputs import ForwardInputs
from toka.models.rope import Rope
from toka.params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from toka.placement import AxisPlacements, placements_of
from toka.runner.adjustment_tables import TABLES
from toka.runner.kv_cache import KVCacheShape
from toka.weights.weight import Weight

# Targets of samples (StepBuffers writes them) that are no token ids.
DRAWN_TARGET = -1  # the id that the step draws
NO_TARGET = -2  # nobody asks

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed", "held_back_ids", "held_back_until")


class Begin(nn.Module):
    """Token ids, slots, embeddings and rope angles of a step."""

    def __init__(self, model: CausalLM, block_size: int):
        super().__init__()
        self.embed_tokens, self.rotary_emb = model.embed_tokens, model.rotary_emb
        self._block_size = block_size

    def forward(
        self,
        token_ids_T: Tensor,
        token_rows_T: Tensor,
        positions_T: Tensor,
        block_table_MW: Tensor,
        last_token_M: Tensor,
    ) -> tuple[Tensor, ...]:
        drawn_T = last_token_M[(-1 - token_ids_T).clamp(min=0)]
        ids_T = torch.where(token_ids_T < 0, drawn_T, token_ids_T)
        block_T = block_table_MW[token_rows_T.clamp(min=0), positions_T // self._block_size]
        slots_T = torch.where(token_rows_T < 0, -1, block_T * self._block_size + positions_T % self._block_size)
        rope = self.rotary_emb(positions_T)
        return self.embed_tokens(ids_T), rope.cos_TF, rope.sin_TF, slots_T


class Layer(nn.Module):
    """One decoder layer with its inputs spread out."""

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_TC: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *attention: Tensor,
    ) -> tuple[Tensor]:
        return (self.layer(hidden_TC, Rope(cos_TF, sin_TF), ForwardInputs(*attention), (key_cache, value_cache)),)


class Last(nn.Module):
    """The last layer; then final norm and LM head for the tokens whose logits are wanted, and the sampler for those that draw."""

    def __init__(self, model: CausalLM, layer: DecoderLayer):
        super().__init__()
        self.layer, self.norm = layer, model.norm
        self.head = model.lm_head if model.lm_head is not None else _TiedHead(model)

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
        sample_index_S: Tensor,
        sample_rows_S: Tensor,
        sample_query_start: Tensor,
        sample_seq_lens_S: Tensor,
        draw_rows_S: Tensor,
        last_token_M: Tensor,
        *settings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        shared = (shared_groups_G5, shared_members_N, shared_lens_X)
        inputs = ForwardInputs(positions_T, slots_T, block_table_MW, rows_R, query_start, seq_lens_R, *shared)
        hidden_TC = self.layer(hidden_TC, Rope(cos_TF, sin_TF), inputs, (key_cache, value_cache))
        logits_SV = self.head(self.norm(hidden_TC[sample_index_S]))
        return torch.ops.toka.sample(logits_SV, draw_rows_S, sample_seq_lens_S, *settings, last_token_M), logits_SV


class _TiedHead(nn.Module):
    def __init__(self, model: CausalLM):
        super().__init__()
        self.embed_tokens = model.embed_tokens

    def forward(self, hidden_SC: Tensor) -> Tensor:
        return self.embed_tokens.logits(hidden_SC)


def kv_cache_shape(model: CausalLM | Encoder, dtype: torch.dtype, block_size: int) -> KVCacheShape:
    """What one KV block of this model is made of: nothing, if it is an encoder."""
    spec = model.spec
    if isinstance(spec, EncoderSpec):
        return KVCacheShape(0, spec.num_heads, spec.head_dim, block_size, dtype)
    return KVCacheShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, dtype)


def build_step_graph(model: CausalLM, dtype: torch.dtype, block_size: int) -> StepGraph:
    """The step of this model; it may be on the meta device. dtype: of activations and KV cache."""
    regions = {**regions_before_last(model, dtype, block_size), "last": _last_region(model, dtype, block_size)}
    return StepGraph(
        tuple(regions.values()),
        calls_of(model, regions, ("sampled", "logits")),
        _step_inputs(model),
        ("sampled", "logits"),
        _follow_ups(TensorSpec(dtype, ("S", model.spec.vocab_size)), block_size),
    )


def num_mask_words(vocab_size: int) -> int:
    """Words of 32 bits in a token mask."""
    return -(-vocab_size // 32)


def scored_ids(targets_S: Tensor, sampled_S: Tensor) -> Tensor:
    """The tokens whose logprobs are wanted; below 0 where none is. targets_S: see StepBuffers."""
    return torch.where(targets_S == DRAWN_TARGET, sampled_S, targets_S)


def step_parameters(model: CausalLM | Encoder) -> dict[str, Tensor]:
    """The model's tensors by the names that the calls use."""
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return {**parameters, **dict(model.named_buffers())}


# -------------------------------------------------------------------------------------------------------------- regions

_INT = torch.int32


def regions_before_last(model: CausalLM, dtype: torch.dtype, block_size: int) -> dict[str, Region]:
    """`begin` and one region for each kind of layer that is not the last, by name."""
    of_region = dict(
        zip(_layer_regions(model), list(model.layers)[:-1], strict=True)
    )  # any one of the layers that share it
    layers = {name: _layer_region(model, name, layer, dtype, block_size) for name, layer in of_region.items()}
    return {"begin": _begin_region(model, block_size), **layers}


def last_layer(model: CausalLM) -> DecoderLayer:
    layer = model.layers[len(model.layers) - 1]
    assert isinstance(layer, DecoderLayer)
    return layer


def _begin_region(model: CausalLM, block_size: int) -> Region:
    inputs = (
        ("token_ids", TensorSpec(_INT, ("T",))),
        ("token_rows", TensorSpec(_INT, ("T",))),
        ("positions", TensorSpec(_INT, ("T",))),
        ("block_table", TensorSpec(_INT, ("M", "W"))),
        ("last_token", TensorSpec(_INT, ("M",))),
    )
    return region_of(model, "begin", Begin(model, block_size), inputs, num_outputs=4)


def _layer_regions(model: CausalLM) -> list[str]:
    """The name of each layer's region but the last's: layers share one if nothing but their numbers tells them apart."""
    formats_of_kind: dict[str, list[str]] = {}
    names = []
    for layer in model.layers[:-1]:
        assert isinstance(layer, DecoderLayer)
        formats = repr([(name, part.format) for name, part in layer.named_modules() if isinstance(part, Weight)])
        seen = formats_of_kind.setdefault(layer.kind, [])
        if formats not in seen:
            seen.append(formats)
        number = seen.index(formats) + 1
        names.append(f"layer_{layer.kind}" if number == 1 else f"layer_{layer.kind}_{number}")
    return names


def _layer_region(model: CausalLM, name: str, layer: nn.Module, dtype: torch.dtype, block_size: int) -> Region:
    assert isinstance(layer, DecoderLayer)
    inputs = layer_inputs(model, dtype, block_size)
    return region_of(model, name, Layer(layer), inputs, num_outputs=1)


def layer_inputs(model: CausalLM, dtype: torch.dtype, block_size: int) -> tuple[tuple[str, TensorSpec], ...]:
    """What every decoder layer takes."""
    spec = model.spec
    cache = TensorSpec(dtype, ("B", spec.num_kv_heads, block_size, spec.head_dim))
    angles = TensorSpec(dtype, ("T", spec.head_dim // 2))
    return (
        ("hidden", TensorSpec(dtype, ("T", spec.hidden_size))),
        ("cos", angles),
        ("sin", angles),
        ("key_cache", cache),
        ("value_cache", cache),
        ("positions", TensorSpec(_INT, ("T",))),
        ("slots", TensorSpec(_INT, ("T",))),
        ("block_table", TensorSpec(_INT, ("M", "W"))),
        ("rows", TensorSpec(_INT, ("R",))),
        ("query_start", TensorSpec(_INT, ("Q",))),  # Q = R + 1, which nothing in the graph needs to know
        ("seq_lens", TensorSpec(_INT, ("R",))),
        ("shared_groups", TensorSpec(_INT, ("G", 5))),
        ("shared_members", TensorSpec(_INT, ("N",))),
        ("shared_lens", TensorSpec(_INT, ("X",))),
    )


def _settings_inputs() -> tuple[tuple[str, TensorSpec], ...]:
    """The tables of sampling settings, in the order of SETTINGS."""
    float_column, int_column = TensorSpec(torch.float32, ("M",)), TensorSpec(_INT, ("M",))
    return (
        ("temperature", float_column),
        ("top_k", int_column),
        ("top_p", float_column),
        ("min_p", float_column),
        ("seed", TensorSpec(torch.int64, ("M",))),
        ("held_back_ids", TensorSpec(_INT, ("M", MAX_STOP_TOKEN_IDS))),
        ("held_back_until", int_column),
    )


def _follow_ups(logits: TensorSpec, block_size: int) -> tuple[OperatorCall, ...]:
    """What may run behind a step."""
    of_samples, (_, vocab_size) = TensorSpec(_INT, ("S",)), logits.shape
    assert isinstance(vocab_size, int)
    adjusted = (
        ("logits", logits),
        ("adjusted_rows", of_samples),
        ("sample_seq_lens", of_samples),
        ("token_of_slot", TensorSpec(_INT, ("L",))),
        ("block_table", TensorSpec(_INT, ("M", "W"))),
        ("num_prompt_tokens", TensorSpec(_INT, ("M",))),
        ("penalties", TensorSpec(torch.float32, ("M", 3))),
        ("bias_ids", TensorSpec(_INT, ("M", MAX_LOGIT_BIASES))),
        ("biases", TensorSpec(torch.float32, ("M", MAX_LOGIT_BIASES))),
        ("bad_words", TensorSpec(_INT, ("M", MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS))),
    )
    late = (
        ("logits", logits),
        ("late_rows", of_samples),
        ("sample_seq_lens", of_samples),
        *_settings_inputs(),
        ("last_token", TensorSpec(_INT, ("M",))),
        ("masks", TensorSpec(_INT, ("K", num_mask_words(vocab_size)))),
        ("mask_of", of_samples),
    )
    scored = (("logits", logits), ("scored_ids", of_samples))
    return (
        OperatorCall("adjust_logits", adjusted, (block_size,)),
        OperatorCall("sample", late, ()),
        OperatorCall("token_logprobs", scored, (MAX_LOGPROBS,)),
    )


def _last_region(model: CausalLM, dtype: torch.dtype, block_size: int) -> Region:
    inputs = (
        *layer_inputs(model, dtype, block_size),
        ("sample_index", TensorSpec(_INT, ("S",))),
        ("sample_rows", TensorSpec(_INT, ("S",))),
        ("sample_query_start", TensorSpec(_INT, ("P",))),  # P = S + 1
        ("sample_seq_lens", TensorSpec(_INT, ("S",))),
        ("draw_rows", TensorSpec(_INT, ("S",))),
        ("last_token", TensorSpec(_INT, ("M",))),
        *_settings_inputs(),
    )
    selection = RowSelection("sample_index", "sample_rows", "sample_query_start", "sample_seq_lens")
    return region_of(model, "last", Last(model, last_layer(model)), inputs, num_outputs=2, selection=selection)


def region_of(
    model: CausalLM | Encoder,
    name: str,
    module: nn.Module,
    inputs: tuple[tuple[str, TensorSpec], ...],
    num_outputs: int,
    selection: RowSelection | None = None,
) -> Region:
    """A region with its parameters placed as the model says; layers of a kind are all placed alike."""
    placements: dict[str, AxisPlacements] = {name: {} for name, _ in module.named_buffers()}
    for parameter, _ in module.named_parameters(remove_duplicate=False):
        weight = model_name(parameter, 0, model).rpartition(".")[0]  # the rest names the part of the weight's format
        placements[parameter] = placements_of(model.PLACEMENT, weight)
    return Region(name, module, inputs, num_outputs, placements, selection)


# ---------------------------------------------------------------------------------------------------------------- calls


def calls_of(model: CausalLM, regions: dict[str, Region], outputs: tuple[str, ...]) -> tuple[Call, ...]:
    """A step of a decoder, whose `last` region has these outputs."""

    def call(region: Region, layer: int, outputs: tuple[str, ...]) -> Call:
        own = {"key_cache": f"key_cache.{layer}", "value_cache": f"value_cache.{layer}"}
        parameters = tuple(model_name(name, layer, model) for name in region.parameter_names())
        return Call(region.name, parameters, tuple(own.get(name, name) for name, _ in region.inputs), outputs)

    names = _layer_regions(model)
    return (
        call(regions["begin"], 0, ("hidden", "cos", "sin", "slots")),
        *[call(regions[name], index, ("hidden",)) for index, name in enumerate(names)],
        call(regions["last"], len(names), outputs),
    )


def model_name(parameter: str, layer: int, model: CausalLM | Encoder) -> str:
    """The model's name of a region's parameter, in the call for this layer."""
    first, _, rest = parameter.partition(".")
    if first == "layer":
        return f"layers.{layer}.{rest}"
    if first == "head" and isinstance(model, CausalLM):
        return f"lm_head.{rest}" if model.lm_head is not None else rest
    return parameter


def _step_inputs(model: CausalLM) -> tuple[str, ...]:
    caches = [f"{kind}_cache.{layer}" for layer in range(len(model.layers)) for kind in ("key", "value")]
    step = ("token_ids", "token_rows", "positions", "rows", "query_start", "seq_lens")
    shared = ("shared_groups", "shared_members", "shared_lens")
    samples = ("sample_index", "sample_rows", "sample_query_start", "sample_seq_lens", "draw_rows")
    late = ("late_rows", "mask_of", "masks", "adjusted_rows", *TABLES, "token_of_slot")
    return (*step, *shared, *samples, *late, "block_table", "last_token", *SETTINGS, *caches)
