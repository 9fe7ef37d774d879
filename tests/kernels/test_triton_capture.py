"""What a CUDA graph asks of the Triton operators' host code, checked without a GPU: it looks at no tensor's contents, copies nothing to
or from the device, and launches what shapes say. So tensors here have shapes only (device "meta"), and the kernels are stood in for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toka.kernels.triton.library import MODULES, implementation
from toka.kernels.triton.tuning import Capability
from toka.params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIASES

NUM_TOKENS, NUM_ROWS, MAX_ROWS, VOCAB_SIZE = 24, 5, 8, 128_259

# Allocation from a graph's pool, other views of the same memory, and a kernel that fills memory on the device.
ALLOWED = {"aten::empty.memory_format", "aten::new_empty", "aten::view.dtype", "aten::detach", "aten::zero_"}
NEEDED = {"num_warps", "num_stages", "enable_fp_fusion"}
TRITON_OPTIONS = {*NEEDED, "maxnreg"}


def floats(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def ints(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def arguments(op: str) -> tuple[Any, ...]:
    """Arguments of one operator, as a step calls it."""
    query_THD, key_THD, value_THD = floats(NUM_TOKENS, 16, 64).split([8, 4, 4], dim=1)
    caches = tuple(floats(10, 4, 16, 64, dtype=torch.float8_e4m3fn) for _ in range(2))
    angles = floats(NUM_TOKENS, 32), floats(NUM_TOKENS, 32)
    lens = (ints(NUM_ROWS), ints(NUM_ROWS + 1), ints(NUM_ROWS))
    real = [floats(MAX_ROWS, dtype=torch.float32) for _ in range(3)]
    whole = [ints(MAX_ROWS) for _ in range(3)]
    held, seed = ints(MAX_ROWS, 16), ints(MAX_ROWS, dtype=torch.int64)
    table = (real[0], whole[0], real[1], real[2], seed, held, whole[1], whole[2])
    return {
        "write_kv": (key_THD, value_THD, *caches, ints(NUM_TOKENS)),
        "rope_write_kv": (query_THD, key_THD, value_THD, *angles, *caches, ints(NUM_TOKENS)),
        "paged_attention": (query_THD, *caches, ints(MAX_ROWS, 300), *lens, 0.125, 0),
        "encoder_attention": (key_THD, value_THD, value_THD, ints(NUM_ROWS + 1), 0.125),
        "sum_tokens": (floats(NUM_TOKENS, 512), *lens, floats(MAX_ROWS, 512, dtype=torch.float32)),
        "merge_attention": (floats(3, NUM_TOKENS, 8, 64).float(), floats(3, NUM_TOKENS, 8).float()),
        "linear": (floats(NUM_TOKENS, 512), floats(1024, 512), floats(1024)),
        "sparse_logits": (floats(NUM_ROWS, 512), floats(VOCAB_SIZE, 512), ints(NUM_ROWS, 21)),
        "sample": (floats(NUM_ROWS, VOCAB_SIZE), ints(NUM_ROWS), ints(NUM_ROWS), *table),
        "token_logprobs": (floats(NUM_ROWS, VOCAB_SIZE), ints(NUM_ROWS), 20),
        "adjust_logits": (
            *(
                floats(NUM_ROWS, VOCAB_SIZE),
                ints(NUM_ROWS),
                ints(NUM_ROWS),
                ints(160),
                ints(MAX_ROWS, 300),
                ints(MAX_ROWS),
            ),
            *(floats(MAX_ROWS, 3, dtype=torch.float32), ints(MAX_ROWS, MAX_LOGIT_BIASES)),
            *(
                floats(MAX_ROWS, MAX_LOGIT_BIASES, dtype=torch.float32),
                ints(MAX_ROWS, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
                16,
            ),
        ),
    }[op]


@dataclass
class KernelStandIn:
    """Takes a kernel's launches, as strictly about names as Triton is."""

    kernel: Any
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    @property
    def arg_names(self) -> list[str]:
        names: list[str] = self.kernel.arg_names
        return names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            known = {name: value for name, value in named.items() if name not in TRITON_OPTIONS}
            bound = inspect.signature(self.kernel.fn).bind(*positional, **known)
            assert named.keys() >= NEEDED
            assert all(isinstance(value, Tensor | int | float) for value in bound.arguments.values())
            self.launches.append((self.kernel.fn.__name__, grid))

        return launch


class HostWork(TorchDispatchMode):
    """Names of PyTorch's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def launches_of(
    op: str, capability: Capability, monkeypatch: pytest.MonkeyPatch, *more: Any
) -> list[tuple[str, tuple[int, ...]]]:
    launches: list[tuple[str, tuple[int, ...]]] = []
    package = "toka.kernels.triton"
    attention = {f"{kind}_attention" for kind in ("decode", "prefill", "shared")}
    names = {*MODULES.values(), *attention, "attention_tile"}
    for module in [importlib.import_module(f"{package}.{name}") for name in names]:  # all before the first is changed
        if hasattr(module, "capability_of"):
            monkeypatch.setattr(module, "capability_of", lambda device: capability)
        if hasattr(module, "num_programs"):
            monkeypatch.setattr(module, "num_programs", lambda device, programs: 132 * programs)
        for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, KernelStandIn(getattr(module, kernel), launches))
    given = arguments(op)
    with HostWork() as work:
        implementation(op)(*given, *more)
    assert work.names <= ALLOWED
    return launches


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_launches_need_shapes_only(op: str, capability: Capability, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = launches_of(op, capability, monkeypatch)
    assert launches and all(size > 0 for _, grid in launches for size in grid)


def test_a_sampled_step_is_four_launches_whatever_its_rows_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = -(-VOCAB_SIZE // 4096)
    assert launches_of("sample", (9, 0), monkeypatch) == [
        ("chunk_max_kernel", (chunks, NUM_ROWS)),
        ("chunk_mass_kernel", (chunks, NUM_ROWS)),
        ("list_kernel", (chunks, NUM_ROWS)),
        ("choose_kernel", (NUM_ROWS,)),
    ]


@pytest.mark.parametrize(
    ("num_lines", "num_more"), [(0, 0), (1, 0), (6, 1)], ids=["no room", "a last line only", "room, used or not"]
)
def test_room_for_groups_is_one_launch_more(num_lines: int, num_more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = (ints(num_lines, 5), ints(100), ints(MAX_ROWS))
    assert launches_of("paged_attention", (9, 0), monkeypatch, *shared) == [
        *[("shared_attention_kernel", (132,))] * num_more,
        ("decode_attention_kernel", (2 * 132,)),
        ("combine_parts_kernel", (NUM_ROWS, 8)),
        ("prefill_attention_kernel", ((1 + NUM_ROWS) * 4,)),
    ]


def test_a_look_at_the_device_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        ints(NUM_ROWS).max().item()
    with HostWork() as work:
        torch.zeros(3)
    assert not work.names <= ALLOWED
