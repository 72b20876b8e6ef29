import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mtrain.data.prefetch import map_ahead


def test_results_come_in_order_and_not_too_far_ahead():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(3) as executor:
        results = map_ahead(executor, lambda number: number * 2, items(), ahead=4)
        assert next(results) == 0
        assert len(taken) == 5
        assert list(results) == [number * 2 for number in range(1, 20)]


def test_an_error_is_raised_at_its_item():
    def fail(number):
        if number == 2:
            raise ValueError("item 2")
        return number

    with ThreadPoolExecutor(2) as executor:
        results = map_ahead(executor, fail, range(5), ahead=3)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="item 2"):
            next(results)


def test_closing_cancels_what_has_not_begun():
    release = threading.Event()
    done = []

    def wait(number):
        if number:
            release.wait(5)
        done.append(number)

    with ThreadPoolExecutor(1) as executor:
        results = map_ahead(executor, wait, range(50), ahead=10)
        next(results)
        results.close()
        release.set()
    assert done in ([0], [0, 1])
