"""The sampler in Triton: the reference's ids, for all filters, ties and broken logits, however the vocabulary is cut.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from toka.errors import ConfigError, InvariantError
from toka.kernels.triton.sample import MAX_VOCAB_SIZE
from toka.kernels.triton.tuning import INTERPRETER, TABLE, TABLE_VERSION

MAX_ROWS = 8
MAX_HELD_BACK = 16
NAN, INF = float("nan"), float("inf")


def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((MAX_ROWS,), value, dtype=dtype)


@dataclass
class Tables:
    """The device's sampling settings, in the operator's order; row 0..MAX_ROWS-1."""

    temperature: Tensor = field(default_factory=lambda: full(1.0))
    top_k: Tensor = field(default_factory=lambda: full(0, torch.int32))
    top_p: Tensor = field(default_factory=lambda: full(1.0))
    min_p: Tensor = field(default_factory=lambda: full(0.0))
    seed: Tensor = field(default_factory=lambda: torch.arange(MAX_ROWS) * 977 - 3)
    held_back_ids: Tensor = field(default_factory=lambda: torch.full((MAX_ROWS, MAX_HELD_BACK), -1, dtype=torch.int32))
    held_back_until: Tensor = field(default_factory=lambda: full(0, torch.int32))
    last_token: Tensor = field(default_factory=lambda: full(-7, torch.int32))


def every_filter() -> Tables:
    """A greedy row, a plain one, and filters alone and together."""
    return Tables(
        temperature=torch.tensor([0.0, 1.0, 0.6, 1.0, 0.7, 1.5, 1.0, 0.3]),
        top_k=torch.tensor([0, 0, 0, 50, 20, 3, 10**9, 1], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 0.9, 1.0, 0.8, 0.95, 0.999, 0.5]),
        min_p=torch.tensor([0.0, 0.02, 0.0, 0.0, 0.05, 0.3, 0.001, 0.0]),
    )


def draw(namespace: str, logits_RV: Tensor, tables: Tables, rows: list[int], first_position: int = 1) -> list[int]:
    """Ids of the rows, at positions that follow each other."""
    tables = replace(tables, last_token=full(-7, torch.int32))
    rows_R = torch.tensor(rows, dtype=torch.int32)
    positions_R = torch.arange(len(rows), dtype=torch.int32) + first_position
    sampled_R = getattr(torch.ops, namespace).sample(logits_RV, rows_R, positions_R, *vars(tables).values())
    assert sampled_R.dtype == torch.int32 and sampled_R.shape == (len(rows),)
    expected_last = full(-7, torch.int32)
    for row, token in zip(rows, sampled_R.tolist(), strict=True):
        if row >= 0:
            expected_last[row] = token
    assert torch.equal(tables.last_token, expected_last)
    return sampled_R.tolist()


def check(logits_RV: Tensor, tables: Tables, rows: list[int], first_position: int = 1) -> list[int]:
    """The ids, which must be those of the reference."""
    sampled = draw("toka_triton", logits_RV, tables, rows, first_position)
    assert sampled == draw("toka", logits_RV, tables, rows, first_position)
    return sampled


def logits(num_rows: int, vocab_size: int, spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_rows, vocab_size, generator=random) * spread).to(dtype)


@pytest.mark.parametrize("vocab_size", [1, 5, 771])
@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 3.0), (torch.bfloat16, 1.0), (torch.float16, 6.0)], ids=str
)
def test_same_ids_as_the_reference(vocab_size: int, dtype: torch.dtype, spread: float) -> None:
    check(logits(MAX_ROWS, vocab_size, spread, dtype), every_filter(), [3, 1, -1, 0, 7, 2, 5, 4], 3000)


@pytest.mark.parametrize("vocab_size", [2, 61, 530])
def test_many_settings_and_ties(vocab_size: int) -> None:
    """Settings drawn at random, logits in steps of a half, so that the filters' edges fall among equals."""
    random = torch.Generator().manual_seed(vocab_size)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(MAX_ROWS, generator=random) * (high - low) + low

    tables = Tables(
        temperature=uniform(0.2, 2.0),
        top_k=uniform(0.0, vocab_size + 1.0).int() * (uniform(0.0, 1.0) < 0.6),
        top_p=uniform(0.05, 1.4).clamp(max=1.0),
        min_p=uniform(-0.3, 0.5).clamp(min=0.0),
        seed=torch.randint(-(2**62), 2**62, (MAX_ROWS,), generator=random),
        held_back_ids=torch.randint(-1, vocab_size, (MAX_ROWS, MAX_HELD_BACK), generator=random).int(),
        held_back_until=(uniform(0.0, 2.0).int() * 10**6),
    )
    logits_RV = (logits(MAX_ROWS, vocab_size, 4.0) * 2).round() / 2
    check(logits_RV, tables, list(range(MAX_ROWS)), 10**5)


def test_nearly_flat_logits_do_not_fit_the_list() -> None:
    check(logits(4, 771, 0.01), every_filter(), [6, 2, 4, 1])


def test_a_large_vocabulary() -> None:
    check(logits(5, 49_155, 2.0, torch.bfloat16), every_filter(), [0, 1, 2, 3, 4])


def test_logits_with_strides_and_no_rows() -> None:
    wide_RV = logits(3, 40, 1.0)
    check(wide_RV[:, 5:30], every_filter(), [0, 2, 4])
    check(wide_RV[:, ::2], every_filter(), [0, 2, 4])
    assert check(wide_RV[:0], every_filter(), []) == []


def test_ties_at_the_edge_are_kept_from_the_lowest_id() -> None:
    """All equal; and two values of which the edge cuts one in two. -0 ties with +0."""
    equal_V = torch.zeros(300)
    equal_V[::3] = -0.0
    two_V = torch.zeros(300)
    two_V[100::50] = 1.0
    tables = Tables(
        top_k=torch.tensor([3, 0, 0, 0, 200, 6, 0, 0], dtype=torch.int32),
        top_p=torch.tensor([1.0, 0.45, 1e-6, 0.0, 0.51, 1.0, 0.9, 0.999]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.0]),
    )
    check(equal_V.expand(5, -1), tables, [0, 1, 2, 3, 4])
    check(two_V.expand(7, -1), tables, [0, 1, 2, 4, 5, 6, 7])


def test_ties_beyond_the_edge_stay_out_of_every_tile() -> None:
    """top_k keeps one likely token, which stands last, and 257 of 399 equals, of which all but one stand in the first tile."""
    logits_V = torch.zeros(400)
    logits_V[399] = 5.0
    sampled = check(logits_V.expand(4, -1), Tables(top_k=full(258, torch.int32)), [0, 1, 2, 3])
    assert 1 < sampled.count(399) < 4


def test_the_last_of_top_k_may_stand_just_below_a_cut() -> None:
    """The first cut is 1.5 temperatures below the largest logit; one token above it, the second just below."""
    logits_V = torch.full((40,), -30.0)
    logits_V[7], logits_V[20] = 0.0, -1.6
    sampled = check(logits_V.expand(MAX_ROWS, -1), Tables(top_k=full(2, torch.int32)), list(range(MAX_ROWS)))
    assert set(sampled) == {7, 20}


def test_fewer_tokens_can_be_drawn_than_top_k() -> None:
    logits_RV = torch.full((4, 300), -INF)
    logits_RV[:, [7, 200, 299]] = torch.tensor([0.0, 1.0, 1.0])
    sampled = check(logits_RV, Tables(top_k=full(50, torch.int32), top_p=full(0.9)), [0, 1, 2, 3])
    assert set(sampled) <= {7, 200, 299}


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits_RV = torch.zeros(2, 700)
    logits_RV[0, [650, 333, 640]] = 5.0
    assert check(logits_RV, Tables(temperature=full(0.0)), [2, 4]) == [333, 0]


def test_held_back_ids_until_their_position() -> None:
    held = torch.full((MAX_ROWS, MAX_HELD_BACK), -1, dtype=torch.int32)
    held[:, 0], held[:, 5] = 3, 10**6  # an id beyond the vocabulary is nothing to hold back
    logits_RV = torch.tensor([[0.0, 1.0, 2.0, 9.0]]).expand(4, -1)
    for temperature, top_k in ((0.0, 0), (0.01, 0), (0.01, 3)):
        tables = Tables(
            temperature=full(temperature),
            top_k=full(top_k, torch.int32),
            held_back_ids=held,
            held_back_until=full(10, torch.int32),
        )
        assert check(logits_RV, tables, [0, 1, 2, 3], 8) == [2, 2, 3, 3]


def test_broken_logits_never_break_the_row() -> None:
    held = torch.full((MAX_ROWS, MAX_HELD_BACK), -1, dtype=torch.int32)
    held[3, :2] = torch.tensor([0, 1])
    logits_RV = torch.tensor(
        [
            [NAN, 1.0, NAN, 5.0],  # NaN can't be drawn
            [NAN, NAN, NAN, NAN],  # nothing can: the lowest id
            [-INF, -INF, 0.0, -INF],
            [-INF, -INF, -INF, -INF],  # the lowest id that is not held back
            *[[-INF, INF, 3.0, INF]] * 4,  # +inf counts as the largest finite number
        ]
    )
    drawn = set()
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1e-40, 2, 1.0), (1e-3, 0, 0.5)):
        tables = Tables(
            temperature=full(temperature),
            top_k=full(top_k, torch.int32),
            top_p=full(top_p),
            held_back_ids=held,
            held_back_until=full(100, torch.int32),
        )
        tokens = check(logits_RV, tables, list(range(MAX_ROWS)))
        assert tokens[:4] == [3, 0, 2, 2]
        drawn |= set(tokens[4:])
    assert drawn == {1, 3}


def test_ids_depend_neither_on_the_batch_nor_on_the_cutting() -> None:
    logits_RV = logits(3, 301, 1.0)
    tables = every_filter()
    together = draw("toka_triton", logits_RV, tables, [1, 2, 4], 10)
    alone = [draw("toka_triton", logits_RV[i : i + 1], tables, [row], 10 + i)[0] for i, row in enumerate([1, 2, 4])]
    assert alone == together
    shipped = TABLE.lookup("sample", INTERPRETER, (301,))
    constants = {"CHUNK": 128, "TILE": 128, "LIST_CAPACITY": 16}
    assert all(shipped[name] != value for name, value in constants.items())
    entry = {
        "kernel": "sample",
        "capability": [0, 0],
        "key": [301],
        "num_warps": 4,
        "num_stages": 1,
        "max_registers": 0,
    }
    TABLE.load_json({"version": TABLE_VERSION, "entries": [{**entry, "constants": constants}]})
    assert TABLE.lookup("sample", INTERPRETER, (301,))["CHUNK"] == 128
    assert draw("toka_triton", logits_RV, tables, [1, 2, 4], 10) == together


def test_a_vocabulary_that_could_overflow_is_refused() -> None:
    for vocab_size in (0, MAX_VOCAB_SIZE + 1):
        with pytest.raises(ConfigError, match=f"the vocabulary has {vocab_size} tokens"):
            draw("toka_triton", torch.zeros(1, vocab_size), Tables(), [0])


def test_a_table_with_gaps_is_refused() -> None:
    tables = Tables(top_p=torch.ones(MAX_ROWS, 2)[:, 0])
    with pytest.raises(InvariantError, match=r"top_p must be contiguous, not of strides \(2,\)"):
        draw("toka_triton", logits(1, 9, 1.0), tables, [0])


def test_opcheck() -> None:
    rows_R, positions_R = torch.tensor([0, -1], dtype=torch.int32), torch.tensor([5, 0], dtype=torch.int32)
    arguments = (logits(2, 9, 1.0), rows_R, positions_R, *vars(Tables()).values())
    overload = torch.ops.toka_triton.sample.default
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


def masks_of(num_masks: int, vocab_size: int, density: float) -> Tensor:
    """Random masks, int32 [K, W]."""
    random = torch.Generator().manual_seed(vocab_size)
    allowed = torch.rand(num_masks, -(-vocab_size // 32), 32, generator=random) < density
    return (allowed.long() << torch.arange(32)).sum(2).to(torch.int32)


@pytest.mark.parametrize("vocab_size", [5, 64, 771])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.6])
def test_masked_ids_are_those_of_the_reference(vocab_size: int, density: float) -> None:
    """Under every filter, beside rows without a mask, with ids held back, and where a mask leaves nothing."""
    tables, logits_RV = every_filter(), logits(MAX_ROWS, vocab_size, 3.0)
    tables.held_back_ids[:, :4] = torch.arange(4, dtype=torch.int32)
    tables.held_back_until = torch.tensor([0, 50, 0, 50, 0, 50, 0, 50], dtype=torch.int32)
    masks_KW, mask_of_R = masks_of(4, vocab_size, density), torch.tensor([0, 1, -1, 2, 3, 3, -1, 0], dtype=torch.int32)
    rows_R, positions_R = torch.arange(MAX_ROWS, dtype=torch.int32), torch.full((MAX_ROWS,), 9, dtype=torch.int32)
    sampled: list[list[int]] = []
    for namespace in ("toka_triton", "toka"):
        tables.last_token = full(-7, torch.int32)
        arguments = (logits_RV, rows_R, positions_R, *vars(tables).values(), masks_KW, mask_of_R)
        sampled.append(getattr(torch.ops, namespace).sample(*arguments).tolist())
        assert tables.last_token.tolist() == sampled[-1]
    assert sampled[0] == sampled[1]
