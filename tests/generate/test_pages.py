"""Bookkeeping of pages: nobody's memory is given away, written over or mixed up, whatever comes and goes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chatwright.generate.pages import Key, Match, OutOfPages, PagePool

SIZE = 4
KEYS: st.SearchStrategy[Key] = st.sampled_from([0, 0, 1, 1, (1, "a")])


def test_what_was_learnt_is_found_whole_pages_first() -> None:
    pool = PagePool(8, SIZE)
    pages = [pool.take() for _ in range(3)]
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert pool.learn(text, pages) == pages
    assert pool.match(text) == Match(tuple(pages[:2]), pages[2], 10)
    assert pool.match(text[:9]) == Match(tuple(pages[:2]), pages[2], 9)
    assert pool.match(text[:7]) == Match((pages[0],), pages[1], 7)
    assert pool.match([1, 2, 3, 4, 5, 9, 9, 9, 9]) == Match((pages[0],), pages[1], 5)
    assert pool.match([2, 2, 3, 4]) == pool.match([]) == Match((), None, 0)
    # The same tokens behind another beginning are another text.
    assert pool.match([9, 2, 3, 4, 5, 6, 7, 8]).tokens == 0


def test_the_end_of_what_was_unused_for_longest_goes_first() -> None:
    pool = PagePool(4, SIZE)
    first, second = [pool.take(), pool.take()], [pool.take(), pool.take()]
    pool.learn(range(8), first)
    pool.learn(range(10, 18), second)
    pool.release(first)
    pool.release(second)
    assert pool.available == 4
    assert pool.take() == first[1]
    assert pool.match(range(8)).tokens == SIZE
    pool.share(first[0])
    pool.release([first[0]])  # used again: now the other text is the older one
    assert [pool.take(), pool.take(), pool.take()] == [second[1], second[0], first[0]]
    with pytest.raises(OutOfPages, match="all 4 pages"):
        pool.take()


def test_an_equal_page_is_taken_over_and_a_tail_grows() -> None:
    pool = PagePool(6, SIZE)
    first, second = [pool.take()], [pool.take(), pool.take()]
    pool.learn([1, 2], first)
    pool.learn([1, 2, 3, 4], first)
    assert pool.learn([1, 2, 3, 4, 5], second) == [first[0], second[1]]
    assert pool.users[first[0]] == 2
    assert pool.users[second[0]] == 0
    assert pool.available == 4
    pool.invalidate(second)  # what follows the 5 is not to be trusted
    assert pool.match([1, 2, 3, 4, 5]).tokens == 4


def test_placeholders_are_known_by_what_they_stand_for() -> None:
    pool = PagePool(12, SIZE)
    one: list[Key] = [1, (2, "a"), (2, "a"), (2, "a"), (2, "a"), 5, 6, 7]
    other: list[Key] = [key if isinstance(key, int) else (2, "b") for key in one]
    bare: list[Key] = [1, 2, 2, 2, 2, 5, 6, 7]
    pages = [pool.take(), pool.take()]
    pool.learn(one, pages)
    assert pool.match(one) == Match(tuple(pages), None, 8)
    # The token before the first placeholder is all that the others have in common with it.
    assert pool.match(other) == pool.match(bare) == Match((), pages[0], 1)
    second, third = [pool.take(), pool.take()], [pool.take(), pool.take()]
    assert pool.learn(other, second) == second and pool.learn(bare, third) == third
    assert [pool.match(keys).pages for keys in (one, other, bare)] == [
        tuple(pages),
        tuple(second),
        tuple(third),
    ]
    again = [pool.take(), pool.take()]
    assert pool.learn(one, again) == pages  # the same image behind the same text: taken over


class Sequences(RuleBasedStateMachine):
    """Texts of two letters and an image come, grow, end and fail. `memory` is what a runner would have
    written: at each place of a page the whole text up to there."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(9, SIZE)
        self.memory: dict[tuple[int, int], tuple[Key, ...]] = {}
        self.texts: list[dict[str, Any]] = []

    def write(self, text: dict[str, Any], count: int) -> None:
        for at in range(text["stored"], text["stored"] + count):
            page = text["pages"][at // SIZE]
            assert self.pool.users[page] == 1, "a shared page is written to"
            known = self.pool._known.get(page)
            assert known is None or len(known.tokens) <= at % SIZE, "a known place is written to"
            self.memory[page, at % SIZE] = tuple(text["tokens"][: at + 1])
        text["stored"] += count

    @rule(tokens=st.lists(KEYS, min_size=1, max_size=3 * SIZE), keep=st.booleans())
    def begin(self, tokens: list[Key], keep: bool) -> None:
        pool, match = self.pool, self.pool.match(tokens[:-1])
        for at in range(match.tokens):
            page = [*match.pages, match.source][at // SIZE]
            assert self.memory[page, at % SIZE] == tuple(tokens[: at + 1])
        for page in match.pages:
            pool.share(page)
        pages, stored = list(match.pages), len(match.pages) * SIZE
        try:
            if match.source is not None:
                pool.share(match.source)
                try:
                    pages.append(pool.take())
                    for at in range(SIZE):
                        self.memory[pages[-1], at] = self.memory.get((match.source, at), ())
                    stored = match.tokens
                finally:
                    pool.release([match.source])
            while len(pages) < pool.needed(len(tokens)):
                pages.append(pool.take())
        except OutOfPages:
            # Where the copy had no page, the one that was held to be copied from may be free by now; nothing
            # else.
            copying = match.source is not None and len(pages) == len(match.pages)
            assert set(pool._idle) <= ({match.source} if copying else set()) and not pool._free
            pool.release(pages)
            return
        text = {"tokens": tokens, "pages": pages, "stored": stored, "keep": keep}
        self.texts.append(text)
        self.write(text, len(tokens) - stored)
        if keep:
            text["pages"] = pool.learn(tokens, pages)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), more=st.lists(KEYS, min_size=1, max_size=2 * SIZE))
    def grow(self, data: st.DataObject, more: list[Key]) -> None:
        text = data.draw(st.sampled_from(self.texts))
        for token in more:
            if len(text["pages"]) * SIZE == text["stored"]:
                if not self.pool.available:
                    return
                text["pages"].append(self.pool.take())
            text["tokens"] = [*text["tokens"], token]
            self.write(text, 1)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        text = data.draw(st.sampled_from(self.texts))
        self.texts.remove(text)
        if fails:
            self.pool.invalidate(text["pages"])
        elif text["keep"]:
            text["pages"] = self.pool.learn(text["tokens"][: text["stored"]], text["pages"])
        self.pool.release(text["pages"])

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        for text in self.texts:
            text["keep"] = False

    @invariant()
    def every_text_is_still_there(self) -> None:
        for text in self.texts:
            for at in range(text["stored"]):
                assert self.memory[text["pages"][at // SIZE], at % SIZE] == tuple(text["tokens"][: at + 1])

    @invariant()
    def pages_are_counted(self) -> None:
        pool = self.pool
        users = Counter(page for text in self.texts for page in text["pages"])
        assert pool.users == [users[page] for page in range(pool.pages)]
        free, idle, used = set(pool._free), set(pool._idle), set(users)
        assert len(pool._free) + len(idle) + len(used) == len(free | idle | used) == pool.pages
        assert not free & set(pool._known)
        assert idle <= set(pool._known)

    @invariant()
    def who_uses_a_page_uses_its_path(self) -> None:
        for known in self.pool._known.values():
            above = known.above
            assert above is not None
            assert known in above.below[known.tokens[0]]
            if above.page >= 0:
                assert self.pool._known[above.page] is above
                assert len(above.tokens) == SIZE
                assert self.pool.users[above.page] >= (self.pool.users[known.page] > 0)


Sequences.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestSequences = Sequences.TestCase
