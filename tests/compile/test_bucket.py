import pytest

from toka.compile.bucket import bucket_of, ladder, mean_padding


@pytest.mark.parametrize("limit", [1, 2, 7, 16, 17, 64, 100, 512, 1000, 8192])
def test_ladder_covers_every_size(limit: int) -> None:
    sizes = ladder(limit)
    assert sizes[0] == 1 and sizes[-1] == limit
    assert list(sizes) == sorted(set(sizes))
    for size in range(1, limit + 1):
        bucket = bucket_of(size, sizes)
        assert size <= bucket <= max(size * 1.125, size + 1 if size > 16 else size)


@pytest.mark.parametrize("limit", [64, 512, 1024, 8192])
def test_mean_padding_is_small(limit: int) -> None:
    assert mean_padding(ladder(limit)) <= 0.05


def test_alignment() -> None:
    assert all(size % 8 == 0 for size in ladder(1000, align=8)[:-1])


def test_too_large() -> None:
    with pytest.raises(ValueError, match=r"513.*512"):
        bucket_of(513, ladder(512))


def test_senseless_limits() -> None:
    with pytest.raises(ValueError, match="limit=0"):
        ladder(0)
