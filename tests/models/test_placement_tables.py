"""Every weight of every family has exactly one placement along "tp", and cutting it so is possible."""

import pytest
import torch

from toka.models.registry import FAMILIES, build_model
from toka.models.spec import read_spec
from toka.placement import Replicate, Shard, placement_of
from toka.weights.weight import Piece, Weight

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "mlp_bias": True,
    "eos_token_id": [1],
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_covers_every_weight(model_type):
    model = build_model(read_spec(CONFIG | {"model_type": model_type}), torch.float32)
    weights = {name: module for name, module in model.named_modules() if isinstance(module, Weight)}
    placements = {name: placement_of(model.PLACEMENT, name, "tp") for name in weights}
    assert sum(isinstance(placement, Shard) for placement in placements.values()) >= 2 * 7 + 2
    for name, placement in placements.items():
        if isinstance(placement, Shard):
            assert Piece(placement.dim, 1, 2).bounds(weights[name].shape)[placement.dim].start > 0
        else:
            assert isinstance(placement, Replicate)


def test_an_axis_that_is_not_mentioned_replicates():
    assert placement_of(FAMILIES["llama"].PLACEMENT, "layers.3.self_attn.q_proj.weight", "pp") == Replicate()


def test_an_unknown_weight_is_an_error():
    with pytest.raises(KeyError, match=r"layers\.0\.router\.weight"):
        placement_of(FAMILIES["llama"].PLACEMENT, "layers.0.router.weight", "tp")
