"""Pages: no leak, no double free, copy-on-write, whatever the order of calls."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt.errors import OutOfPages
from hf_llmopt.kv_cache import BlockTable, PagePool

PAGE = 4


def check(pool: PagePool, tables: list[BlockTable]) -> None:
    refs = [0] * (pool.num_pages + 1)
    for table in tables:
        assert list(table.pages[: table.passed]) == [0] * table.passed
        assert all(table.pages[table.passed :])
        run = table.pages[table.run :]
        assert list(run) == list(range(run[0], run[0] + len(run))) if run else True
        for page in table.pages:
            refs[page] += bool(page)
    assert refs == [pool.refs(page) for page in range(pool.num_pages + 1)]
    assert pool.used == sum(1 for count in refs if count)
    assert pool.free + pool.used == pool.num_pages
    for page in range(1, pool.num_pages + 1):
        assert (pool.next_held(page) == page) == bool(refs[page])


OPERATIONS = st.lists(st.tuples(st.sampled_from("nrfctxg"), st.integers(0, 7), st.integers(0, 40)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.integers(0, 12), st.integers(0, 6))
def test_random_calls_never_leak(operations: list[tuple[str, int, int]], pages: int, room: int) -> None:
    pool = PagePool(pages)
    tables: list[BlockTable] = []
    tokens: list[int] = []
    for name, pick, amount in operations:
        if name == "n":
            tables.append(BlockTable(pool, PAGE, room))
            tokens.append(0)
        elif name == "g":
            pool.grow(min(20, pool.num_pages + amount))
        elif tables:
            index = pick % len(tables)
            table, length = tables[index], tokens[index]
            if name == "r":
                before, free = list(table.pages), pool.free
                missing = table.missing(length, length + amount)
                try:
                    copies = table.reserve(length, length + amount)
                except OutOfPages:
                    assert missing > free
                    assert list(table.pages) == before
                else:
                    tokens[index] += amount
                    assert all(source != target for source, target in copies)
                    # Whoever is about to write must be the only one to hold the pages it writes to.
                    written = table.pages[length // PAGE : -(-tokens[index] // PAGE)] if amount else []
                    assert all(pool.refs(page) == 1 for page in written)
            elif name == "f":
                tables.append(table.fork())
                tokens.append(length)
            elif name == "c":
                tokens[index] = min(length, max(amount, table.passed * PAGE))
                table.crop(tokens[index])
            elif name == "t":
                table.trim(min(length, amount))
            else:
                table.clear()
                tables.pop(index)
                tokens.pop(index)
        check(pool, tables)
    for table in tables:
        table.clear()
    assert pool.used == 0
    assert pool.take(pool.num_pages)[0] == list(range(1, pool.num_pages + 1)), "plans must be forgotten too"


def test_runs_of_equal_room_lie_at_equal_distances() -> None:
    pool = PagePool(12)
    tables = [BlockTable(pool, PAGE, room=4) for _ in range(3)]
    for table in tables:
        table.reserve(0, PAGE)
    assert [table.pages[0] for table in tables] == [1, 5, 9]
    for table in tables:
        table.reserve(PAGE, 4 * PAGE)
        assert table.run == 0


def test_plans_give_way_when_pages_are_scarce() -> None:
    pool = PagePool(4)
    first, second = BlockTable(pool, PAGE, room=4), BlockTable(pool, PAGE, room=4)
    first.reserve(0, 1)
    second.reserve(0, 3 * PAGE)
    assert pool.free == 0


def test_release_of_a_free_page_is_noticed() -> None:
    pool = PagePool(2)
    pages, _ = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)


def test_skip_starts_behind_passed_pages() -> None:
    table = BlockTable(PagePool(3), PAGE)
    table.skip(2 * PAGE + 1)
    table.reserve(2 * PAGE, 3 * PAGE)
    assert list(table.pages) == [0, 0, 1]
    assert table.held == 1
