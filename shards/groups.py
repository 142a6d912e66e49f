"""Groups of items that are linked, directly or through others: what must lie in one split."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

Links = Iterable[tuple[int, int]]
"""Pairs of items, by position."""


def links_of_equal(keys: Iterable[Iterable[Hashable]]) -> Iterator[tuple[int, int]]:
    """Yield the links of items that have a key in common, each with the first one that has it.

    `keys`: those of each item, in order."""
    first: dict[Hashable, int] = {}
    for i, of_item in enumerate(keys):
        for key in of_item:
            yield first.setdefault(key, i), i


def components(count: int, ends: np.ndarray) -> np.ndarray:
    """Return the number of the connected component of each of `count` items; `ends` [links, 2] are positions."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(count, count))
    found: np.ndarray = connected_components(graph, directed=False)[1]
    return found


def linked_groups(count: int, links: Links) -> list[list[int]]:
    """Return the groups of `count` items, each ascending, in the order of their first items.

    They are the connected components of the graph of the links."""
    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    return _by_component(components(count, ends).tolist())


def _by_component(component: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, number in enumerate(component):
        groups.setdefault(number, []).append(i)
    return list(groups.values())
