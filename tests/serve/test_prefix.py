"""The prefix cache against a dictionary that forgets nothing, and at its limits."""

import collections

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from mla_jax.cache import PageTable, PoolExhausted
from mla_jax.serve.prefix import PrefixCache, page_keys

NUM_PAGES, PAGE_SIZE = 12, 2
TOKENS = st.lists(st.integers(0, 1), max_size=9)


class Prefixes(stateful.RuleBasedStateMachine):
    """Sequences that share pages through the cache; a page remembers the tokens that its rows stand for."""

    def __init__(self):
        super().__init__()
        self.table = PageTable(NUM_PAGES, PAGE_SIZE)
        self.rows = [None] * NUM_PAGES  # all tokens up to the end of the page
        self.tokens = {}

    @stateful.initialize(limit=st.sampled_from([None, None, 0, 1, 5]))
    def make(self, limit):
        self.cache = PrefixCache(self.table, limit)

    @stateful.rule(tokens=TOKENS)
    def come(self, tokens):
        """Takes what there is, computes the rest, and lets others find it."""
        keys = page_keys(tokens, PAGE_SIZE, "root")
        found = self.cache.find(keys)
        for end, page in enumerate(found, start=1):
            assert self.rows[page] == tuple(tokens[: end * PAGE_SIZE])
        name = self.table.open(found)
        more = len(tokens) - self.table.length(name)
        self.cache.evict(max(0, self.table.needed(name, more) - self.table.num_free))
        try:
            assert self.table.append(name, more) == []
        except PoolExhausted:
            self.table.free(name)
            return
        pages = self.table.pages(name)
        for i in range(len(found), len(keys)):
            self.rows[pages[i]] = tuple(tokens[: (i + 1) * PAGE_SIZE])
        self.cache.add(keys, pages[: len(keys)])
        self.tokens[name] = tokens
        if self.cache.limit is None:
            assert self.cache.find(keys) == [self.cache._pages[key] for key in keys]

    @stateful.precondition(lambda self: self.tokens)
    @stateful.rule(data=st.data())
    def go(self, data):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        self.table.free(name)
        del self.tokens[name]

    @stateful.precondition(lambda self: self.tokens)
    @stateful.rule(data=st.data())
    def turn_out_wrong(self, data):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        known = set(self.cache._pages.values())
        wrong = {self.rows[page] for page in self._full(name) if page in known}
        self.cache.forget(self.table.pages(name))
        for page in self.cache._pages.values():
            ends = range(PAGE_SIZE, len(self.rows[page]) + 1, PAGE_SIZE)
            assert not wrong.intersection(self.rows[page][:end] for end in ends)

    @stateful.rule(count=st.integers(0, 4))
    def evict(self, count):
        idle = [page for page in self.cache._pages.values() if self.table.num_owners(page) == 1]
        num_free = self.table.num_free
        assert self.cache.evict(count) == min(count, len(idle))
        assert self.table.num_free == num_free + min(count, len(idle))

    @stateful.rule()
    def clear(self):
        self.cache.clear()
        assert len(self.cache) == 0

    @stateful.invariant()
    def pages_are_held_once_by_the_cache_and_once_by_each_who_has_them(self):
        if not hasattr(self, "cache"):
            return
        owners = collections.Counter(self.cache._pages.values())
        assert all(count == 1 for count in owners.values())
        for name in self.tokens:
            owners.update(self.table.pages(name))
        assert [owners[page] for page in range(NUM_PAGES)] == self.table._owners
        assert sorted([*self.table._free, *owners]) == list(range(NUM_PAGES))
        assert self.cache.limit is None or len(self.cache) <= self.cache.limit

    @stateful.invariant()
    def a_page_never_outlives_the_one_before_it(self):
        if not hasattr(self, "cache") or self.cache.limit is not None:
            return
        known = {self.rows[page] for page in self.cache._pages.values()}
        assert all(row[:-PAGE_SIZE] in known or len(row) == PAGE_SIZE for row in known)

    def teardown(self):
        if hasattr(self, "cache"):
            for name in self.tokens:
                self.table.free(name)
            self.cache.clear()
            assert self.table.num_free == NUM_PAGES

    def _full(self, name):
        return self.table.pages(name)[: self.table.length(name) // PAGE_SIZE]


TestPrefixes = Prefixes.TestCase
TestPrefixes.settings = hypothesis.settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_key_depends_on_all_tokens_up_to_it_and_on_the_root():
    tokens = [5, 6, 7, 8, 9]
    keys = page_keys(tokens, 2, "root")
    assert len(keys) == len(set(keys)) == 2
    assert page_keys(tokens[:4], 2, "root") == keys and page_keys(tokens[:3], 2, "root") == keys[:1]
    for place in range(4):
        other = page_keys([*tokens[:place], 1, *tokens[place + 1 :]], 2, "root")
        assert [a == b for a, b in zip(keys, other, strict=True)] == [place >= 2, False]
    assert not set(keys) & set(page_keys(tokens, 2, "other root"))
    assert not set(keys) & set(page_keys(tokens, 4, "root"))


def test_token_ids_of_several_bytes_do_not_run_into_each_other():
    assert page_keys([1, 256], 2, "") != page_keys([256, 1], 2, "")
    assert page_keys([0, 1], 2, "") != page_keys([0, 65536], 2, "")


@pytest.mark.parametrize("used", [0, 1], ids=["older", "newer"])
def test_what_was_not_asked_for_longest_goes_first(used):
    table = PageTable(4, 1)
    cache = PrefixCache(table)
    keys = [page_keys([token], 1, "") for token in range(3)]
    for key in keys:
        name = table.open()
        table.append(name, 1)
        cache.add(key, table.pages(name))
        table.free(name)
    cache.find(keys[used])
    assert cache.evict(1) == 1
    assert [bool(cache.find(key)) for key in keys] == [used == 0, used == 1, True]


def test_pages_that_somebody_runs_on_are_not_evicted():
    table = PageTable(4, 1)
    cache = PrefixCache(table)
    name = table.open()
    table.append(name, 3)
    cache.add(page_keys([1, 2, 3], 1, ""), table.pages(name))
    assert cache.evict(3) == 0 and len(cache) == 3
    table.free(name)
    assert cache.evict(3) == 3 and table.num_free == 4
