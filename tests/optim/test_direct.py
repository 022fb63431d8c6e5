"""Compiled functions that are called without the checks of torch.compile: the same results, and checks where they are needed."""

import weakref

import pytest
import torch

from momo_hf.optim.kernels.direct import Direct


@pytest.fixture
def scaled():
    """x <- factor x in place, and its sum; with the number of its calls that were checked."""

    def function(x, weight, factor):
        assert x.size(1) == 16  # one size may vary, and no other
        x.mul_(weight * factor)
        return [x.sum()]

    made = Direct(function, None)
    checked, made.checks = made._checked, 0

    def count(*arguments):
        made.checks += 1
        return checked(*arguments)

    made._checked = count
    return made


def given(*arguments):
    return lambda: arguments


def rows(count):
    return torch.arange(16.0 * count).view(count, 16)


def test_later_calls_are_not_checked_whatever_the_size(scaled):
    for number, count in enumerate((3, 5, 8, 2)):
        x, weight = rows(count), torch.tensor(1.0 + number)
        (found,) = scaled("twice", count, [x, weight], given(x, weight, 2.0))
        torch.testing.assert_close(x, 2.0 * weight * rows(count))
        torch.testing.assert_close(found, x.sum())
    assert scaled.checks == 1


def test_one_row_has_code_of_its_own(scaled):
    for count in (1, 3, 1, 5, 1):
        x, weight = rows(count), torch.tensor(1.5)
        (found,) = scaled("twice", count, [x, weight], given(x, weight, 2.0))
        torch.testing.assert_close(x, 3.0 * rows(count))
        torch.testing.assert_close(found, x.sum())


def test_other_constants_have_code_of_their_own(scaled):
    for factor in (2.0, 3.0, 2.0, 3.0):
        x, weight = rows(3), torch.tensor(1.0)
        scaled(factor, 3, [x, weight], given(x, weight, factor))
        torch.testing.assert_close(x, factor * rows(3))
    assert scaled.checks == 2


def test_another_number_of_threads_is_checked(scaled):
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            x, weight = rows(3), torch.tensor(1.0)
            scaled("twice", 3, [x, weight], given(x, weight, 2.0))
    finally:
        torch.set_num_threads(threads)
    assert scaled.checks == 2


def test_what_cannot_be_told_apart_is_checked_every_time(scaled):
    for _ in range(3):
        x, weight = rows(3), torch.tensor(1.0)
        scaled("twice", None, [x, weight], given(x, weight, 2.0))  # several sizes
        x = rows(3)
        scaled("twice", 3, [x, weight, weight], given(x, weight, 2.0))  # one tensor in two places
        x = rows(3)
        scaled("twice", 4, [x, weight], given(x, weight, 2.0))  # a size that is none
    assert scaled.checks == 9


def test_no_tensor_is_kept(scaled):
    for _ in range(2):
        x, weight = rows(3), torch.tensor(1.0)
        scaled("twice", 3, [x, weight], given(x, weight, 2.0))
        gone = weakref.ref(x)
        del x
        assert gone() is None
