"""The model traces end to end with symbolic token and row counts, and layers of one kind trace to one graph."""

import pytest
import torch
from torch.export import Dim

from toka.models.registry import build_model
from toka.models.spec import read_spec

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 2,
    "eos_token_id": [1],
}


class Step(torch.nn.Module):
    """Token ids to logits of the rows' last tokens, as one traced function."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token_ids_T, inputs, kv_caches):
        hidden_TC = self.model(token_ids_T, inputs, kv_caches)
        last_R = inputs.query_start[1:].long() - 1
        return self.model.logits(hidden_TC[last_R])


def make_model(model_type, rope_type="default"):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    model = build_model(read_spec(CONFIG | {"model_type": model_type, "rope_parameters": rope}), torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    model.rotary_emb.compute_buffers(torch.device("cpu"))
    return model


def ids(count, seed=0):
    return torch.randint(64, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("model_type", "rope_type"), [("llama", "default"), ("llama", "dynamic"), ("qwen2", "linear"), ("qwen3", "yarn")]
)
def test_exports_with_symbolic_sizes(model_type, rope_type, paged_run):
    model = make_model(model_type, rope_type)
    run = paged_run(model)
    token_ids, inputs = run.inputs([(0, ids(5)), (2, ids(3))])
    T, R = Dim("T", min=2, max=4096), Dim("R", min=2, max=512)
    input_dims = type(inputs)({0: T}, {0: T}, None, {0: R}, {0: R + 1}, {0: R})
    program = torch.export.export(
        Step(model),
        (token_ids, inputs, run.kv_caches),
        dynamic_shapes=({0: T}, input_dims, [(None, None)] * 3),
        strict=False,
    )
    other, expected_run = paged_run(model), paged_run(model)
    pieces = [(0, ids(7, 1)), (1, ids(2, 2)), (3, ids(1, 3))]
    token_ids, inputs = other.inputs(pieces)
    found = program.module()(token_ids, inputs, other.kv_caches)
    expected = torch.stack([logits[-1] for logits in expected_run.step(pieces)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for (key, value), (expected_key, expected_value) in zip(other.kv_caches, expected_run.kv_caches, strict=True):
        torch.testing.assert_close(key, expected_key)
        torch.testing.assert_close(value, expected_value)


def test_layers_of_one_kind_trace_to_one_graph(paged_run):
    model = make_model("qwen2")
    run = paged_run(model)
    token_ids, inputs = run.inputs([(0, ids(5)), (2, ids(3))])
    arguments = (model.embed_tokens(token_ids), model.rotary_emb(inputs.positions_T), inputs, run.kv_caches[0])
    graphs = [torch.export.export(layer, arguments, strict=False).graph_module.code for layer in model.layers]
    assert [layer.kind for layer in model.layers] == ["full", "full", "sliding_6"]
    assert graphs[0] == graphs[1] != graphs[2]


def test_a_model_on_the_meta_device_has_no_storage():
    model = build_model(read_spec(CONFIG | {"model_type": "llama"}), torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert tensors
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
