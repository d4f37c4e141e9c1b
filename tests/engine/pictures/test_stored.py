"""Pictures that have an address for an hour."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from imagine_flash.engine.pictures.stored import StoredPictures


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Between threads: after a few lines of each."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_the_oldest_go_where_there_is_no_room() -> None:
    stored = StoredPictures(10)
    names = [stored.keep(bytes(4), "png") for _ in range(3)]
    assert [stored.find(name) for name in names] == [None, bytes(4), bytes(4)]
    assert stored.find(stored.keep(bytes(11), "png")) is None and stored.find(names[2]) is not None


def test_many_threads_keep_and_find_at_once(many_switches: None) -> None:
    """Two that made room at once raised KeyError."""
    stored, all_there = StoredPictures(10), threading.Barrier(8)

    def work(_: int) -> None:
        all_there.wait(10)
        for _ in range(3000):
            stored.find(stored.keep(bytes(5), "png"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(stored._files) == 2 and stored._files.currsize == 10
