"""Find stop strings in a text that arrives in pieces, and never let go of a character that may belong to one.

Aho-Corasick: after each character the automaton's state is the longest suffix of the text that begins some stop string. Its
depth is therefore exactly how many characters must be held back. Constant work per character, however many stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache


class _Node:
    __slots__ = ("depth", "fail", "match_length", "next")

    def __init__(self, depth: int):
        self.depth = depth
        self.next: dict[str, _Node] = {}
        self.fail: _Node = self
        self.match_length = 0  # of the longest stop string that ends here; 0 = none


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(node.depth + 1))
        node.match_length = len(stop)
    root.fail = root
    queue = deque(root.next.values())
    for child in queue:
        child.fail = root
    while queue:
        node = queue.popleft()
        for char, child in node.next.items():
            fallback = node.fail
            while fallback is not root and char not in fallback.next:
                fallback = fallback.fail
            child.fail = fallback.next.get(char, root)
            child.match_length = child.match_length or child.fail.match_length
            queue.append(child)
    return root


class StopMatcher:
    """Watches the text of one sample for its stop strings.

    The first stop string to be complete ends the text, whichever way the text is cut into pieces; where several are complete
    at the same character, the longest counts. `held` characters at most are kept back: less than the longest stop string.
    stopped: it was found. found: which one it was, "" before.
    """

    __slots__ = ("_held", "_node", "_root", "found")

    def __init__(self, stops: Iterable[str]):
        self._root = self._node = _automaton(tuple(stops))
        self._held = ""
        self.found = ""

    @property
    def stopped(self) -> bool:
        return bool(self.found)

    def push(self, text: str, may_stop: bool = True) -> str:
        """The text that is now known not to belong to a stop string.

        Sets `stopped` when a stop string is complete; it and what follows are dropped. With may_stop False (min_tokens is not
        reached), a stop string that ends in this piece is text like any other.
        """
        node, root = self._node, self._root
        pending = self._held + text
        end = len(self._held)
        for char in text:
            end += 1
            while node is not root and char not in node.next:
                node = node.fail
            node = node.next.get(char, root)
            if node.match_length:
                if may_stop:
                    start = end - node.match_length
                    self.found, self._held, self._node = pending[start:end], "", root
                    return pending[:start]
                node = root
        keep_from = len(pending) - node.depth
        self._held, self._node = pending[keep_from:], node
        return pending[:keep_from]

    def flush(self) -> str:
        """The text held back, when no more follows."""
        held, self._held, self._node = self._held, "", self._root
        return held
