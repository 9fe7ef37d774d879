"""Sampling: every implementation for CPUs against the reference, and both against probability theory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from toka.kernels.registry import FLOATS, Implementation, implementations

pytestmark = pytest.mark.usefixtures("cpp_kernels")

ALL = [i for i in implementations("sample") if i.family != "triton"]
FAST = [i for i in ALL if i.family != "reference"]
MAX_ROWS = 8
MAX_HELD_BACK = 16


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


def sample(
    implementation: Implementation, logits_RV: Tensor, tables: Tables, *, rows: list[int], positions: list[int]
) -> list[int]:
    rows_R, positions_R = torch.tensor(rows, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)
    sampled = implementation.overload(logits_RV, rows_R, positions_R, *vars(tables).values())
    assert sampled.dtype == torch.int32 and sampled.shape == (len(rows),)
    for i, row in enumerate(rows):
        if row >= 0:
            assert int(tables.last_token[row]) == int(sampled[i])
        else:
            assert int(sampled[i]) == 0
    return sampled.tolist()


def words(num_words: int, *allowed: int) -> list[int]:
    """The words of a mask that allows these ids, as the int32 of the operator."""
    bits = sum(1 << token for token in allowed)
    return [
        (bits >> 32 * word & 0xFFFFFFFF) - (1 << 32 if bits >> 32 * word + 31 & 1 else 0) for word in range(num_words)
    ]


def masked(
    implementation: Implementation, logits_RV: Tensor, tables: Tables, masks: list[list[int]], mask_of: list[int]
) -> list[int]:
    """Ids of rows 0 .. R - 1 at position 9."""
    rows_R = torch.arange(len(mask_of), dtype=torch.int32)
    masks_KW, mask_of_R = torch.tensor(masks, dtype=torch.int32), torch.tensor(mask_of, dtype=torch.int32)
    positions_R = torch.full_like(rows_R, 9)
    sampled = implementation.overload(logits_RV, rows_R, positions_R, *vars(tables).values(), masks_KW, mask_of_R)
    assert torch.equal(tables.last_token[: len(rows_R)], sampled)
    return sampled.tolist()


def draws(implementation: Implementation, logits_V: list[float], tables: Tables, count: int = 400) -> set[int]:
    """The ids that turn up when one row draws at many positions."""
    logits_RV = torch.tensor([logits_V]).expand(count, -1)
    positions = torch.arange(count, dtype=torch.int32)
    rows = torch.zeros(count, dtype=torch.int32)
    return set(implementation.overload(logits_RV, rows, positions, *vars(tables).values()).tolist())


every = pytest.mark.parametrize("implementation", ALL, ids=lambda i: i.family)
every_fast = pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)


@every_fast
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 1000, 49_152])
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_same_draws_as_the_reference(
    implementation: Implementation, vocab_size: int, dtype: torch.dtype, spread: float
) -> None:
    random = torch.Generator().manual_seed(vocab_size)
    logits_RV = (torch.randn(MAX_ROWS, vocab_size, generator=random) * spread).to(dtype)
    tables = Tables(
        temperature=torch.tensor([0.0, 1.0, 0.6, 1.0, 0.7, 1.5, 1.0, 0.3]),
        top_k=torch.tensor([0, 0, 0, 50, 20, 3, 10**9, 1], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 0.9, 1.0, 0.8, 0.95, 0.999, 0.5]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 0.3, 0.001, 0.0]),
    )
    reference = implementations("sample")[-1]
    assert reference.family == "reference"
    rows = [3, 1, -1, 0, 7, 2, 5, 4]
    for position in (1, 3000):
        positions = [position + i for i in range(len(rows))]
        expected = sample(
            reference, logits_RV, replace(tables, last_token=full(-7, torch.int32)), rows=rows, positions=positions
        )
        assert sample(implementation, logits_RV, tables, rows=rows, positions=positions) == expected


@every
def test_frequencies_follow_the_probabilities(implementation: Implementation) -> None:
    """Chi-squared over 4,000 draws with fixed seeds; 7 degrees of freedom, 0.1 % quantile 24.3."""
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.0])
    tables, count = Tables(temperature=full(0.8)), 4000
    sampled = implementation.overload(
        logits_V.expand(count, -1),
        torch.arange(count, dtype=torch.int32) % MAX_ROWS,
        torch.arange(count, dtype=torch.int32) // MAX_ROWS,
        *vars(tables).values(),
    )
    expected = (logits_V / 0.8).softmax(0) * count
    observed = torch.bincount(sampled.long(), minlength=8)
    assert float(((observed - expected) ** 2 / expected).sum()) < 24.3


@every
def test_greedy_takes_the_lowest_of_equals(implementation: Implementation) -> None:
    logits_RV = torch.zeros(2, 200)
    logits_RV[0, [150, 33, 70]] = 5.0
    assert sample(implementation, logits_RV, Tables(temperature=full(0.0)), rows=[2, 4], positions=[9, 9]) == [33, 0]


@every
def test_top_k_beyond_what_can_be_drawn_keeps_all_of_it(implementation: Implementation) -> None:
    inf = float("inf")
    assert draws(implementation, [1.0, -inf, 3.0, -inf, 2.0, -inf], Tables(top_k=full(4, torch.int32))) == {0, 2, 4}


@every
def test_top_k_keeps_exactly_k_and_prefers_lower_ids(implementation: Implementation) -> None:
    logits_V = [1.0, 2.0, 1.0, 2.0, 1.0, 0.0]
    assert draws(implementation, logits_V, Tables(top_k=full(3, torch.int32))) == {0, 1, 3}
    assert draws(implementation, logits_V, Tables(top_k=full(1, torch.int32))) == {1}
    assert draws(implementation, logits_V, Tables(top_k=full(6, torch.int32))) == {0, 1, 2, 3, 4, 5}


@every
def test_top_p_keeps_the_smallest_set_that_reaches_it(implementation: Implementation) -> None:
    uniform = [0.0] * 10
    assert draws(implementation, uniform, Tables(top_p=full(0.5))) == {0, 1, 2, 3, 4}
    assert draws(implementation, uniform, Tables(top_p=full(0.51))) == {0, 1, 2, 3, 4, 5}
    assert draws(implementation, uniform, Tables(top_p=full(1e-6))) == {0}
    halves = [float(torch.tensor(p).log()) for p in (0.125, 0.5, 0.25, 0.125)]
    assert draws(implementation, halves, Tables(top_p=full(0.7))) == {1, 2}


@every
def test_top_p_counts_what_top_k_left(implementation: Implementation) -> None:
    logits_V = [float(torch.tensor(p).log()) for p in (0.4, 0.3, 0.2, 0.1)]
    # After top_k = 2 the rest is 4/7 and 3/7: 0.5 is reached by the first alone, as it would not be of the whole.
    assert draws(implementation, logits_V, Tables(top_k=full(2, torch.int32), top_p=full(0.5))) == {0}
    assert draws(implementation, logits_V, Tables(top_p=full(0.5))) == {0, 1}


@every
def test_min_p_drops_what_is_unlikely_beside_the_best(implementation: Implementation) -> None:
    logits_V = [float(torch.tensor(p).log()) for p in (0.5, 0.3, 0.15, 0.05)]
    assert draws(implementation, logits_V, Tables(min_p=full(0.2))) == {0, 1, 2}
    assert draws(implementation, logits_V, Tables(min_p=full(1.0))) == {0}


@every
def test_held_back_ids_until_their_position(implementation: Implementation) -> None:
    held = torch.full((MAX_ROWS, MAX_HELD_BACK), -1, dtype=torch.int32)
    held[:, 0], held[:, 5] = 3, 10**6  # an id beyond the vocabulary is nothing to hold back
    logits_RV = torch.tensor([[0.0, 1.0, 2.0, 9.0]]).expand(2, -1)
    for temperature in (0.0, 0.01):
        tables = Tables(temperature=full(temperature), held_back_ids=held, held_back_until=full(10, torch.int32))
        assert sample(implementation, logits_RV, tables, rows=[0, 1], positions=[9, 10]) == [2, 3]


@every
def test_broken_logits_never_break_the_row(implementation: Implementation) -> None:
    nan, inf = float("nan"), float("inf")
    held = torch.full((MAX_ROWS, MAX_HELD_BACK), -1, dtype=torch.int32)
    held[3, :2] = torch.tensor([0, 1])
    logits_RV = torch.tensor(
        [
            [nan, 1.0, nan, 5.0],  # NaN can't be drawn
            [nan, nan, nan, nan],  # nothing can: the lowest id
            [-inf, -inf, 0.0, -inf],
            [-inf, -inf, -inf, -inf],  # the lowest id that is not held back
            [-inf, inf, 3.0, inf],  # +inf counts as the largest finite number
        ]
    )
    for temperature in (0.0, 1e-40, 1e-3):
        for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5), (2, 0.5)):
            tables = Tables(
                temperature=full(temperature),
                top_k=full(top_k, torch.int32),
                top_p=full(top_p),
                held_back_ids=held,
                held_back_until=full(100, torch.int32),
            )
            tokens = sample(implementation, logits_RV, tables, rows=[0, 1, 2, 3, 4], positions=[5] * 5)
            assert tokens[:4] == [3, 0, 2, 2] and tokens[4] in (1, 3)
            assert temperature > 0 or tokens[4] == 1


@every
def test_draws_depend_on_seed_and_position_only(implementation: Implementation) -> None:
    logits_V = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    tables = Tables(seed=torch.full((MAX_ROWS,), 42), top_p=full(0.95))
    alone = sample(implementation, logits_V[None], tables, rows=[5], positions=[17])
    noise_RV = torch.randn(4, 5000)
    noise_RV[2] = logits_V
    assert sample(implementation, noise_RV, tables, rows=[0, -1, 7, 2], positions=[1, 0, 17, 3])[2] == alone[0]
    rows, positions = [0, 1, 2, 3, 4, 5], [18, 19, 20, 21, 22, 23]
    later = sample(implementation, logits_V.expand(6, -1), tables, rows=rows, positions=positions)
    tables.seed.fill_(43)
    other = sample(implementation, logits_V.expand(6, -1), tables, rows=rows, positions=positions)
    assert len(set(later)) > 1 and later != other


def test_bad_arguments_are_refused() -> None:
    tables = Tables()
    op = torch.ops.toka_cpp.sample.default
    rows, positions = torch.tensor([0], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="outside of the tables"):
        op(torch.zeros(1, 4), rows + MAX_ROWS, positions, *vars(tables).values())
    with pytest.raises(RuntimeError, match="seed must be Long"):
        op(torch.zeros(1, 4), rows, positions, *vars(replace(tables, seed=full(0, torch.int32))).values())
    with pytest.raises(RuntimeError, match="vocabulary must not be empty"):
        op(torch.zeros(1, 0), rows, positions, *vars(tables).values())


@every_fast
@pytest.mark.parametrize("vocab_size", [1, 31, 64, 1000, 49_152])
@pytest.mark.parametrize("density", [0.001, 0.5, 0.999])
def test_masked_draws_are_those_of_the_reference(
    implementation: Implementation, vocab_size: int, density: float
) -> None:
    """Every filter, over what random masks leave, for some rows; two rows share a mask and some have none."""
    random = torch.Generator().manual_seed(vocab_size)
    logits_RV = torch.randn(MAX_ROWS, vocab_size, generator=random)
    num_words = -(-vocab_size // 32)
    masks = [
        words(num_words, *torch.nonzero(torch.rand(vocab_size, generator=random) < density).flatten().tolist())
        for _ in range(4)
    ]
    tables = Tables(
        temperature=torch.tensor([0.0, 0.0, 0.6, 1.0, 0.7, 1.5, 1.0, 0.3]),
        top_k=torch.tensor([0, 0, 0, 50, 20, 3, 10**9, 1], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 0.9, 1.0, 0.8, 0.95, 0.999, 0.5]),
        held_back_ids=torch.arange(MAX_HELD_BACK, dtype=torch.int32).expand(MAX_ROWS, -1).contiguous(),
        held_back_until=torch.tensor([0, 10, 0, 10, 0, 10, 0, 10], dtype=torch.int32),
    )
    mask_of = [0, 1, -1, 2, 3, 3, -1, 0]
    reference = implementations("sample")[-1]
    expected = masked(reference, logits_RV, replace(tables, last_token=full(-7, torch.int32)), masks, mask_of)
    assert masked(implementation, logits_RV, tables, masks, mask_of) == expected


@every
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_the_mask_allows_is_drawn(implementation: Implementation, temperature: float) -> None:
    """Also where it is the least likely, ids beyond the vocabulary's last full word, and a row without a mask."""
    logits_RV = torch.linspace(30, -30, 70).expand(4, -1)
    masks = [words(3, 69), words(3, 33, 40, 41), words(3, *range(70))]
    tables = Tables(temperature=full(temperature))
    sampled = masked(implementation, logits_RV, tables, masks, [0, 1, 2, -1])
    assert sampled[0] == 69 and sampled[1] == 33 and sampled[2] < 9 and sampled[3] < 9


@every
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_can_be_drawn_the_grammar_is_kept(implementation: Implementation, temperature: float) -> None:
    """The lowest id that is allowed and not held back; a mask of held-back ids alone counts more than min_tokens; and no mask is empty."""
    logits_RV = torch.zeros(4, 70)
    logits_RV[:2] = float("-inf")
    tables = Tables(temperature=full(temperature), held_back_until=full(10, torch.int32))
    tables.held_back_ids[:, :2] = torch.tensor([33, 66], dtype=torch.int32)
    masks = [words(3, 33, 40, 66), words(3, 33, 66), words(3)]
    assert masked(implementation, logits_RV, tables, masks, [0, 1, 1, 2]) == [40, 33, 33, 0]


def test_masks_of_the_wrong_size_are_refused() -> None:
    logits_RV = torch.zeros(2, 70)
    arguments = [torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), *vars(Tables()).values()]
    ones = [torch.ones(size, dtype=torch.int32) for size in ((2, 2), (2, 3), (2,), (3,))]
    for masks, mask_of in ((ones[0], 0 * ones[2]), (ones[1], 0 * ones[3]), (ones[1], 2 * ones[2]), (ones[1], None)):
        with pytest.raises(RuntimeError, match=r"mask|place"):
            torch.ops.toka_cpp.sample(logits_RV, *arguments, masks, mask_of)
