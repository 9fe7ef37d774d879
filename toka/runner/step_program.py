"""One step of a decoder, from token ids to sampled ids, as regions for the compiler (floor 5).

    begin ─► layer × num_layers ─► end

`begin` finds each token's id, rope angles and KV slot, and embeds it; a layer region stands for all layers of its kind; `end` keeps
the tokens whose successor is drawn, and only for them computes the final norm, the LM head and the sampler.

Legend: T tokens, R rows, S samples, M rows of the request table, W blocks a row, B KV blocks, C hidden, D head dim, F = D / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toka.compile.step_graph import Call, Region, StepGraph, TensorSpec
from toka.models.decoder import CausalLM, DecoderLayer
from toka.models.inputs import ForwardInputs
from toka.models.rope import Rope
from toka.params import MAX_STOP_TOKEN_IDS
from toka.runner.kv_cache import KVCacheShape

ATTENTION_INPUTS = ("positions", "slots", "block_table", "rows", "query_start", "seq_lens")
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


class End(nn.Module):
    """Final norm, LM head and sampler for the tokens whose successor is drawn."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.norm = model.norm
        self.head = model.lm_head if model.lm_head is not None else _TiedHead(model)

    def forward(
        self,
        hidden_TC: Tensor,
        sample_index_S: Tensor,
        sample_rows_S: Tensor,
        sample_seq_lens_S: Tensor,
        last_token_M: Tensor,
        *settings: Tensor,
    ) -> tuple[Tensor]:
        logits_SV = self.head(self.norm(hidden_TC[sample_index_S]))
        return (torch.ops.toka.sample(logits_SV, sample_rows_S, sample_seq_lens_S, *settings, last_token_M),)


class _TiedHead(nn.Module):
    def __init__(self, model: CausalLM):
        super().__init__()
        self.embed_tokens = model.embed_tokens

    def forward(self, hidden_SC: Tensor) -> Tensor:
        return self.embed_tokens.logits(hidden_SC)


def kv_cache_shape(model: CausalLM, dtype: torch.dtype, block_size: int) -> KVCacheShape:
    """What one KV block of this model is made of."""
    spec = model.spec
    return KVCacheShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, dtype)


def build_step_graph(model: CausalLM, dtype: torch.dtype, block_size: int) -> StepGraph:
    """The step of this model; it may be on the meta device. dtype: of activations and KV cache."""
    kinds: dict[str, DecoderLayer] = {}
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        kinds.setdefault(layer.kind, layer)
    regions = (
        _begin_region(model, block_size),
        *[_layer_region(model, kind, layer, dtype, block_size) for kind, layer in kinds.items()],
        _end_region(model, dtype),
    )
    return StepGraph(
        regions, _calls(model, {region.name: region for region in regions}), _step_inputs(model), ("sampled",)
    )


def step_parameters(model: CausalLM) -> dict[str, Tensor]:
    """The model's tensors by the names that the calls use."""
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return {**parameters, **dict(model.named_buffers())}


# -------------------------------------------------------------------------------------------------------------- regions

_INT = torch.int32


def _begin_region(model: CausalLM, block_size: int) -> Region:
    inputs = (
        ("token_ids", TensorSpec(_INT, ("T",))),
        ("token_rows", TensorSpec(_INT, ("T",))),
        ("positions", TensorSpec(_INT, ("T",))),
        ("block_table", TensorSpec(_INT, ("M", "W"))),
        ("last_token", TensorSpec(_INT, ("M",))),
    )
    return Region("begin", Begin(model, block_size), inputs, num_outputs=4)


def _layer_region(model: CausalLM, kind: str, layer: DecoderLayer, dtype: torch.dtype, block_size: int) -> Region:
    spec = model.spec
    cache = TensorSpec(dtype, ("B", spec.num_kv_heads, block_size, spec.head_dim))
    angles = TensorSpec(dtype, ("T", spec.head_dim // 2))
    inputs = (
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
    )
    return Region(f"layer_{kind}", Layer(layer), inputs, num_outputs=1)


def _end_region(model: CausalLM, dtype: torch.dtype) -> Region:
    float_column, int_column = TensorSpec(torch.float32, ("M",)), TensorSpec(_INT, ("M",))
    inputs = (
        ("hidden", TensorSpec(dtype, ("T", model.spec.hidden_size))),
        ("sample_index", TensorSpec(_INT, ("S",))),
        ("sample_rows", TensorSpec(_INT, ("S",))),
        ("sample_seq_lens", TensorSpec(_INT, ("S",))),
        ("last_token", int_column),
        ("temperature", float_column),
        ("top_k", int_column),
        ("top_p", float_column),
        ("min_p", float_column),
        ("seed", TensorSpec(torch.int64, ("M",))),
        ("held_back_ids", TensorSpec(_INT, ("M", MAX_STOP_TOKEN_IDS))),
        ("held_back_until", int_column),
    )
    return Region("end", End(model), inputs, num_outputs=1)


# ---------------------------------------------------------------------------------------------------------------- calls


def _calls(model: CausalLM, regions: dict[str, Region]) -> tuple[Call, ...]:
    begin_inputs = tuple(name for name, _ in regions["begin"].inputs)
    end_inputs = tuple(name for name, _ in regions["end"].inputs)
    calls = [Call("begin", regions["begin"].parameter_names(), begin_inputs, ("hidden", "cos", "sin", "slots"))]
    for index, layer in enumerate(model.layers):
        region = regions[f"layer_{layer.kind}"]
        own = tuple(name.replace("layer.", f"layers.{index}.", 1) for name in region.parameter_names())
        caches = (f"key_cache.{index}", f"value_cache.{index}")
        calls.append(Call(region.name, own, ("hidden", "cos", "sin", *caches, *ATTENTION_INPUTS), ("hidden",)))
    head = "embed_tokens." if model.lm_head is None else "lm_head."
    tied, untied = "head.embed_tokens.", "head."
    prefix = tied if model.lm_head is None else untied
    names = tuple(
        head + name.removeprefix(prefix) if name.startswith(prefix) else name
        for name in regions["end"].parameter_names()
    )
    calls.append(Call("end", names, end_inputs, ("sampled",)))
    return tuple(calls)


def _step_inputs(model: CausalLM) -> tuple[str, ...]:
    caches = [f"{kind}_cache.{layer}" for layer in range(len(model.layers)) for kind in ("key", "value")]
    step = ("token_ids", "token_rows", "positions", "rows", "query_start", "seq_lens")
    samples = ("sample_index", "sample_rows", "sample_seq_lens")
    return (*step, *samples, "block_table", "last_token", *SETTINGS, *caches)
