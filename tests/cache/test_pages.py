"""The page table against a model that writes every token down: nothing leaks, nothing is overwritten.

Hypothesis makes 10^5 operations, `pytest --hypothesis-profile=long` 10^6.
"""

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from mla_jax.cache import PageTable, PoolExhausted

NUM_PAGES, PAGE_SIZE = 12, 4
MISSING = object()


class Pages(stateful.RuleBasedStateMachine):
    """A pool of tokens kept as the device would keep it, beside the tokens that each sequence must have."""

    def __init__(self):
        super().__init__()
        self.table = PageTable(NUM_PAGES, PAGE_SIZE)
        self.pool = [[MISSING] * PAGE_SIZE for _ in range(NUM_PAGES)]
        self.tokens = {}
        self.num_written = 0

    sequences = stateful.Bundle("sequences")

    @stateful.rule(target=sequences)
    def open(self):
        sequence = self.table.open()
        assert sequence not in self.tokens
        self.tokens[sequence] = []
        return sequence

    @stateful.rule(sequence=sequences, count=st.integers(0, 3 * PAGE_SIZE))
    def append(self, sequence, count):
        before = self.table.row(sequence, NUM_PAGES), self.table.num_free
        length = len(self.tokens[sequence])
        try:
            copies = self.table.append(sequence, count)
        except PoolExhausted:
            assert (self.table.row(sequence, NUM_PAGES), self.table.num_free) == before
            assert self.table.length(sequence) == length
            return
        for source, target in copies:
            self.pool[target] = list(self.pool[source])
        pages = self.table.row(sequence, NUM_PAGES)
        for slot in range(length, length + count):
            self.num_written += 1
            self.pool[pages[slot // PAGE_SIZE]][slot % PAGE_SIZE] = self.num_written
            self.tokens[sequence].append(self.num_written)

    @stateful.rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        num_free = self.table.num_free
        twin = self.table.fork(sequence)
        assert twin not in self.tokens and self.table.num_free == num_free
        self.tokens[twin] = list(self.tokens[sequence])
        return twin

    @stateful.rule(sequence=sequences, data=st.data())
    def truncate(self, sequence, data):
        length = data.draw(st.integers(0, len(self.tokens[sequence])))
        self.table.truncate(sequence, length)
        del self.tokens[sequence][length:]

    @stateful.rule(sequence=stateful.consumes(sequences))
    def free(self, sequence):
        self.table.free(sequence)
        del self.tokens[sequence]

    @stateful.invariant()
    def every_sequence_has_its_tokens(self):
        for sequence, tokens in self.tokens.items():
            pages = self.table.row(sequence, NUM_PAGES)
            found = [self.pool[pages[slot // PAGE_SIZE]][slot % PAGE_SIZE] for slot in range(len(tokens))]
            assert found == tokens and self.table.length(sequence) == len(tokens)

    @stateful.invariant()
    def every_page_is_free_or_owned(self):
        rows = [self.table.row(sequence, NUM_PAGES) for sequence in self.tokens]
        for (sequence, tokens), row in zip(self.tokens.items(), rows, strict=True):
            num_pages = -(-len(tokens) // PAGE_SIZE)
            assert len(set(row[:num_pages])) == num_pages, sequence
            assert set(row[num_pages:]) <= {NUM_PAGES}
        owned = set().union(*rows) - {NUM_PAGES}
        assert self.table.num_free + len(owned) == NUM_PAGES

    def teardown(self):
        for sequence in self.tokens:
            self.table.free(sequence)
        assert self.table.num_free == NUM_PAGES


TestPages = Pages.TestCase
TestPages.settings = hypothesis.settings(
    max_examples=max(450, hypothesis.settings.default.max_examples),  # of 230 operations or so
    stateful_step_count=250,
    deadline=None,
    derandomize=True,
    database=None,
)


def _filled(*lengths, num_pages=NUM_PAGES):
    table = PageTable(num_pages, PAGE_SIZE)
    sequences = [table.open() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        assert table.append(sequence, length) == []
    return table, *sequences


def test_a_fork_that_goes_on_within_a_page_gets_a_copy_of_it():
    table, first = _filled(6)
    twin = table.fork(first)
    (source, target), pages = table.append(twin, 1)[0], table.row(first, 2)
    assert source == pages[1] and target not in pages
    assert table.row(twin, 2) == [pages[0], target]
    assert table.append(first, 1) == []  # the page is its own again


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    table, first = _filled(8)
    twin = table.fork(first)
    assert table.append(twin, 1) == [] and table.append(first, 5) == []
    assert table.row(twin, 3)[:2] == table.row(first, 4)[:2]
    assert table.num_free == NUM_PAGES - 5


def test_a_copy_is_counted_among_the_pages_that_must_be_free():
    table, first = _filled(6, num_pages=2)
    twin = table.fork(first)
    with pytest.raises(PoolExhausted, match="1 pages of 4 tokens must be free, got 0 of 2"):
        table.append(twin, 1)
    table.free(first)
    assert table.append(twin, 2) == []


def test_a_row_ends_in_a_page_that_is_none():
    table, sequence = _filled(5)
    row = table.row(sequence, 4)
    assert row[2:] == [NUM_PAGES, NUM_PAGES]
    with pytest.raises(ValueError, match="width must be at least the 2 pages of the sequence, got 1"):
        table.row(sequence, 1)


def test_what_no_table_has_is_refused():
    table, sequence = _filled(5)
    for arguments in [(0, 4), (4, 0)]:
        with pytest.raises(ValueError, match="must be at least 1"):
            PageTable(*arguments)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        table.append(sequence, -1)
    for length in (-1, 6):
        with pytest.raises(ValueError, match=rf"length must be in \[0, 5\], got {length}"):
            table.truncate(sequence, length)
    table.free(sequence)
    with pytest.raises(KeyError):
        table.fork(sequence)
