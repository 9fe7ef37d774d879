"""Which implementation serves an operator: declared here once, chosen once when a graph is compiled, never at run time.

An implementation belongs to a family (reference, torch, cpp, triton). The caller names the families that it can use (cpp only after
`kernels.cpp.build.load`, triton only after `kernels.triton.library.load`); among those that accept the device, the dtype and the
shape, the highest priority wins. Where Triton interprets (TRITON_INTERPRET=1, for tests), family triton accepts the CPU too.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from toka.errors import ConfigError
from toka.kernels.op_schema import SCHEMAS
from toka.kernels.triton import library as triton_library

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Trait(enum.Enum):
    """What an implementation promises beyond being right within tolerance."""

    BATCH_INVARIANT = "a row's result is bitwise the same whatever runs beside it and on however many threads"
    CHUNK_INVARIANT = "a token's result is bitwise the same however its prefill was cut, and by prefill as by decode"


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operator.

    family: where it comes from; the operator is `torch.ops.<namespace>.<name>`, name being the op's own unless it says otherwise.
    devices: device types, empty = any. dtypes: of the activations (query, keys, logits). max_head_dim, head_dim_multiple: shapes it
    takes; 0 = any. priority: higher wins; reference 0, PyTorch's own 5, portable fast code 10, code for one machine 20.
    packing: operator that lays the weight out as this implementation wants it, once, when weights are bound; "" = as it is.
    """

    op: str
    family: str
    namespace: str
    priority: int
    devices: frozenset[str] = frozenset()
    dtypes: frozenset[torch.dtype] = FLOATS
    max_head_dim: int = 0
    head_dim_multiple: int = 1
    traits: frozenset[Trait] = field(default_factory=frozenset)
    name: str = ""
    packing: str = ""

    @property
    def overload(self) -> torch._ops.OpOverload:
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, self.namespace), self.name or self.op).default
        return overload

    def refusal(self, device: str, dtype: torch.dtype, head_dim: int | None, traits: Collection[Trait]) -> str | None:
        """Why it can't serve, in words; None if it can."""
        if not self._runs_on(device):
            return f"runs on {', '.join(sorted(self.devices))} only"
        if dtype not in self.dtypes:
            return f"does not take {dtype}"
        if head_dim is not None and self.max_head_dim and head_dim > self.max_head_dim:
            return f"head dim {head_dim} is above {self.max_head_dim}"
        if head_dim is not None and head_dim % self.head_dim_multiple:
            return f"head dim {head_dim} is no multiple of {self.head_dim_multiple}"
        missing = [trait.name.lower() for trait in traits if trait not in self.traits]
        return f"is not {', '.join(missing)}" if missing else None

    def _runs_on(self, device: str) -> bool:
        if not self.devices or device in self.devices:
            return True
        return self.family == "triton" and device == "cpu" and triton_library.is_interpreting()


@dataclass(frozen=True)
class Kernel:
    """The choice: `overload` goes into the graph in place of `torch.ops.toka.<op>.default`; `reason` says why."""

    implementation: Implementation
    overload: torch._ops.OpOverload
    reason: str


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("write_kv", "reference", "toka", priority=0, traits=frozenset(Trait)),
    Implementation("paged_attention", "reference", "toka", priority=0, traits=frozenset({Trait.BATCH_INVARIANT})),
    Implementation("sample", "reference", "toka", priority=0, traits=frozenset(Trait)),
    Implementation("write_kv", "cpp", "toka_cpp", priority=10, devices=frozenset({"cpu"}), traits=frozenset(Trait)),
    Implementation(
        "paged_attention",
        "cpp",
        "toka_cpp",
        priority=10,
        devices=frozenset({"cpu"}),
        max_head_dim=256,
        traits=frozenset(Trait),
    ),
    Implementation(
        "encoder_attention",
        "cpp",
        "toka_cpp",
        priority=10,
        devices=frozenset({"cpu"}),
        max_head_dim=256,
        traits=frozenset(Trait),
    ),
    *(
        Implementation(
            op,
            "cpp",
            "toka_cpp",
            priority=10,
            devices=frozenset({"cpu"}),
            traits=frozenset(Trait),
            name=name,
            packing=packing,
        )
        for op, name, packing in (
            ("sample", "", ""),
            ("adjust_logits", "", ""),
            ("sum_tokens", "", ""),
            ("token_logprobs", "", ""),
            ("linear", "linear_packed", "toka_cpp::pack_linear"),
            ("embedding", "embedding_packed", "toka_cpp::pack_linear"),
            ("linear_quantised", "linear_quantised_packed", "toka_cpp::pack_quantised"),
            ("embedding_quantised", "embedding_quantised_packed", "toka_cpp::pack_quantised"),
        )
    ),
    Implementation(
        "rope_write_kv",
        "cpp",
        "toka_cpp",
        priority=10,
        devices=frozenset({"cpu"}),
        max_head_dim=256,
        head_dim_multiple=2,
        traits=frozenset(Trait),
    ),
    Implementation("linear", "torch", "aten", priority=5),
    Implementation("embedding", "torch", "aten", priority=5, traits=frozenset(Trait)),
    *(
        Implementation(op, "reference", "toka", priority=0, traits=frozenset(Trait))
        for op in (
            *("rope_write_kv", "linear", "merge_attention", "sparse_logits", "adjust_logits", "token_logprobs"),
            *("encoder_attention", "sum_tokens"),
        )
    ),
    Implementation("linear_quantised", "reference", "toka", priority=0),
    Implementation("embedding_quantised", "reference", "toka", priority=0, traits=frozenset(Trait)),
    *(
        Implementation(
            op,
            "triton",
            "toka_triton",
            priority,
            devices=frozenset({"cuda"}),
            dtypes=dtypes,
            max_head_dim=256,
            head_dim_multiple=multiple,
            traits=traits,
        )
        for op, priority, dtypes, multiple, traits in (
            ("write_kv", 10, FLOATS, 1, frozenset(Trait)),
            ("rope_write_kv", 10, FLOATS, 2, frozenset(Trait)),
            ("paged_attention", 10, FLOATS, 1, frozenset({Trait.BATCH_INVARIANT})),
            ("encoder_attention", 10, FLOATS, 1, frozenset(Trait)),
            ("sum_tokens", 10, FLOATS, 1, frozenset(Trait)),
            ("merge_attention", 10, frozenset({torch.float32}), 1, frozenset(Trait)),
            ("sample", 10, FLOATS, 1, frozenset(Trait)),
            ("adjust_logits", 10, FLOATS, 1, frozenset(Trait)),
            ("token_logprobs", 10, FLOATS, 1, frozenset(Trait)),
            ("sparse_logits", 10, FLOATS, 1, frozenset(Trait)),
            # Below PyTorch's own product, which is faster where rows need not be the same to the bit.
            ("linear", 3, FLOATS, 1, frozenset(Trait)),
        )
    ),
)


# Products and embeddings come into a graph as PyTorch's own operators, which then compete with the others.
ATEN_OPS = frozenset({"linear", "embedding"})


def implementations(op: str) -> list[Implementation]:
    """All of one operator, by descending priority."""
    if op not in SCHEMAS and op not in ATEN_OPS:
        raise ConfigError(f"unknown kernel operator {op!r}; known: {', '.join(sorted({*SCHEMAS, *ATEN_OPS}))}")
    return sorted((i for i in IMPLEMENTATIONS if i.op == op), key=lambda i: -i.priority)


def choose(
    op: str,
    device: str,
    dtype: torch.dtype,
    *,
    families: Collection[str],
    head_dim: int | None = None,
    traits: Collection[Trait] = (),
) -> Kernel:
    """The best implementation of `op` for a device type and an activation dtype.

    families: those that may be used, for example {"reference", "cpp"}. head_dim: None = the operator has none.
    traits: what it must promise. Raises ConfigError, naming every refusal, if nothing fits.
    """
    passed_over: list[str] = []
    for candidate in implementations(op):
        refusal = (
            candidate.refusal(device, dtype, head_dim, traits)
            if candidate.family in families
            else "is not among the families in use"
        )
        if refusal is None:
            reason = f"{candidate.family}, priority {candidate.priority}"
            if passed_over:
                reason += "; passed over: " + "; ".join(passed_over)
            return Kernel(candidate, candidate.overload, reason)
        passed_over.append(f"{candidate.family} {refusal}")
    raise ConfigError(f"no kernel for {op} on {device} with {dtype}: {'; '.join(passed_over)}.")
