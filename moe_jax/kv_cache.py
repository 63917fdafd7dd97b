"""The pages of one rank's KV cache: who holds them, and which prefixes can be found again.

A page is room for the K/V of `page_size` consecutive tokens of a sequence, in every layer. This module deals in
page numbers only. It must not know the device arrays behind them, nor why a sequence wants or loses its pages.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class OutOfPages(RuntimeError):
    """No page is free and none can be evicted."""


def extend_digests(digests: list[bytes], token_ids: Sequence[int], page_size: int) -> None:
    """Append the digests of the full pages of token_ids that `digests` does not cover yet.

    A page's digest is chained to its parent's, so it names the page's tokens and everything before them, which is
    what K/V depend on. A cryptographic hash, because a collision would show one client another's prefix.
    """
    for page in range(len(digests), len(token_ids) // page_size):
        digest = blake2b(digests[-1] if digests else b"", digest_size=32)
        digest.update(array("q", token_ids[page * page_size : (page + 1) * page_size]).tobytes())
        digests.append(digest.digest())


class PagePool:
    """Reference-counted pages 0..num_pages-1 with a prefix cache.

    A page is in one of three states: referenced (count > 0), cached (count 0, but published: it can be matched
    until it is evicted), or free. Referenced pages may be published too; those are shared, not copied.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size: found {num_pages} and {page_size}, expected at least 1 each")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_pages
        self._free: deque[int] = deque(range(num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._page_of: dict[bytes, int] = {}  # published pages
        self._digest_of: dict[int, bytes] = {}  # its inverse

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that somebody references."""
        return self.num_pages - self.num_available

    def references(self, page: int) -> int:
        """How many sequences hold this page."""
        return self._references[page]

    def allocate(self) -> int:
        """A page with one reference and unknown content. Evicts the least recently released page when none is free.

        Raises OutOfPages.
        """
        if self._free:
            page = self._free.popleft()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        else:
            raise OutOfPages(f"all {self.num_pages} pages are referenced: release some first")
        self._references[page] = 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """Give up one reference to each page of a sequence, passed in the sequence's order.

        Raises ValueError for a page that nobody references.
        """
        # Last page first: a prefix is found only from its first page on, so its tail must be evicted before its head.
        for page in reversed(list(pages)):
            if self._references[page] < 1:
                raise ValueError(f"page {page} is released, but nobody references it: expected at least 1 reference")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digest_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The published pages of the longest known prefix. Takes no reference, so good only until the next change."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Like `find`, and takes a reference to each page. Their content must not be written any more."""
        pages = self.find(digests)
        for page in pages:
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1
        return pages

    def publish(self, page: int, digest: bytes) -> bool:
        """Let others find this page. Only for a referenced, full page whose K/V have been written.

        False if the page stays private: caching is off, or another page already has the same content (two sequences
        computed one prefix at the same time; the first wins). Raises ValueError for a page that nobody references or
        that is published under another digest.
        """
        if self._references[page] < 1:
            raise ValueError(f"page {page} is published, but nobody references it: expected at least 1 reference")
        if self._digest_of.get(page, digest) != digest:
            raise ValueError(f"page {page} is already published with other content: expected to be published once")
        if not self.prefix_caching or self._page_of.get(digest, page) != page:
            return False
        self._page_of[digest] = page
        self._digest_of[page] = digest
        return True
