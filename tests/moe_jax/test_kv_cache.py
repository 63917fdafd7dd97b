import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.kv_cache import OutOfPages, PagePool, extend_digests


def digests_of(tokens, size):
    digests = []
    extend_digests(digests, tokens, size)
    return digests


def test_digests_name_the_whole_prefix():
    assert len(digests_of([1, 2, 3, 4, 5], 2)) == 2
    assert digests_of([1, 2, 3, 4], 2)[0] == digests_of([1, 2, 9, 4], 2)[0]
    assert digests_of([1, 2, 3, 4], 2)[1] != digests_of([9, 2, 3, 4], 2)[1]
    assert digests_of([1, 2], 2) != digests_of([2, 1], 2)
    tokens, digests = list(range(10)), []
    for length in range(11):  # extended bit by bit
        extend_digests(digests, tokens[:length], 3)
    assert digests == digests_of(tokens, 3)


def test_tail_is_evicted_before_head_and_old_before_new():
    pool = PagePool(4, 1)
    first, second = digests_of([1, 2], 1), digests_of([3, 4], 1)
    for digests in (first, second):
        pages = [pool.allocate(), pool.allocate()]
        for page, digest in zip(pages, digests, strict=True):
            assert pool.publish(page, digest)
        pool.release(pages)
    pool.allocate()
    assert (len(pool.find(first)), len(pool.find(second))) == (1, 2)
    pool.release(pool.match(first))  # used again: now the youngest
    pool.allocate()
    assert (len(pool.find(first)), len(pool.find(second))) == (1, 1)


def test_errors():
    pool = PagePool(1, 4)
    page = pool.allocate()
    with pytest.raises(OutOfPages, match="all 1 pages"):
        pool.allocate()
    pool.publish(page, b"a")
    with pytest.raises(ValueError, match="already published"):
        pool.publish(page, b"b")
    pool.release([page])
    with pytest.raises(ValueError, match="released"):
        pool.release([page])
    with pytest.raises(ValueError, match="published"):
        pool.publish(page, b"a")
    with pytest.raises(ValueError, match="expected at least 1"):
        PagePool(0, 4)


def test_caching_off():
    pool = PagePool(2, 4, prefix_caching=False)
    page = pool.allocate()
    assert not pool.publish(page, b"a") and pool.find([b"a"]) == []


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 3))
def test_random_histories(seed, num_pages, size):
    """A pool against a plain model of it: who references what, what is published, and the order of release."""
    rng = random.Random(seed)
    pool = PagePool(num_pages, size)
    holders: list[list[int]] = []  # pages of each sequence
    published: dict[int, tuple[int, ...]] = {}  # page -> the tokens of its prefix
    released: list[int] = []  # cached pages, oldest first
    for _ in range(40):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(size * 4 + 1))]
        digests = digests_of(tokens, size)
        match rng.choice(("compute", "compute", "match", "release", "release")):
            case "compute":  # match what is known, compute and publish the rest
                pages = pool.match(digests)
                released = [page for page in released if page not in pages]
                while len(pages) < len(digests) and pool.num_available:
                    free = set(range(num_pages)) - set(released) - {p for h in [*holders, pages] for p in h}
                    page = pool.allocate()
                    if free:
                        assert page in free
                    else:
                        assert page == released.pop(0)
                        del published[page]
                    prefix = tuple(tokens[: (len(pages) + 1) * size])
                    pages.append(page)
                    if rng.random() < 0.8:
                        first = prefix not in published.values()
                        assert pool.publish(page, digests[len(pages) - 1]) is first
                        if first:
                            published[page] = prefix
                holders.append(pages)
            case "match":
                pages = pool.match(digests)
                assert pages == pool.find(digests)
                longest = 0
                while longest < len(digests) and tuple(tokens[: (longest + 1) * size]) in published.values():
                    longest += 1
                assert len(pages) == longest
                for i, page in enumerate(pages):
                    assert published[page] == tuple(tokens[: (i + 1) * size])
                released = [page for page in released if page not in pages]
                holders.append(pages)
            case "release" if holders:
                pages = holders.pop(rng.randrange(len(holders)))
                pool.release(pages)
                held = {page for holder in holders for page in holder}
                released += [page for page in reversed(pages) if page not in held and page in published]
            case _:
                pass
        counts = Counter(page for holder in holders for page in holder)
        assert [pool.references(page) for page in range(num_pages)] == [counts[page] for page in range(num_pages)]
        assert pool.num_used == len(counts) and pool.num_available == num_pages - len(counts)
    for pages in holders:
        pool.release(pages)
    assert sorted(pool.allocate() for _ in range(num_pages)) == list(range(num_pages))
