"""Documents of several sources, mixed, from any place on."""

import heapq

from zoo.pretraining.sources import documents

READERS = 32  # files that are open at a time


def start(names):
    """The first place in a mixture."""
    return [[0, 0] for _ in names[:READERS]]


def mixture(names, sizes, read=None):
    """Documents of several sources in turns, so that all of them end at about the same time.

    Readers, at most 32, have the sources dealt to them and read one after another. The next
    document is one of the reader that has read the smallest share of what it was dealt.

    Args:
        names: list of sources.
        sizes: dictionary of what `size` says of each.
        read: for each reader how many sources it is through, and its place in the next one.

    Yields:
        Pairs of such a list, before the document, and a text.
    """
    read = [list(place) for place in read or start(names)]
    dealt = [names[number :: len(read)] for number in range(len(read))]
    readers = [_in_turn(*pair) for pair in zip(dealt, read, strict=True)]
    heap = [(_share(dealt[number], sizes, *read[number]), number) for number in range(len(read))]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        found = next(readers[number], None)
        if found is not None:
            text, place = found
            yield [list(place) for place in read], text
            read[number] = place
            heapq.heappush(heap, (_share(dealt[number], sizes, *place), number))


def _in_turn(names, place):
    """Documents of one source after another, and the place after each."""
    done, first = place
    for number, name in enumerate(names[done:], done):
        for text, after in documents(name, first):
            yield text, [number, after]
        first = 0


def _share(names, sizes, done, place):
    whole = sum(sizes[name][0] for name in names)
    share = sum(sizes[name][0] for name in names[:done])
    if place:
        in_bytes, end = sizes[names[done]]
        share += in_bytes * place / end
    return share / whole
