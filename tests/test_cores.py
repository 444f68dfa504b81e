"""Number of threads within operations on small tensors."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
import torch

import gmmkeops as gk
from gmmkeops import reductions
from gmmkeops.data import Batch
from gmmkeops.reductions.cores import alone, cores, one_thread, threads_for, user_threads


@pytest.fixture
def three():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_block_uses_one_thread_and_engines_all(three):
    with one_thread():
        assert (torch.get_num_threads(), cores()) == (1, 3)
        with one_thread(), user_threads():
            assert torch.get_num_threads() == 3
        assert (torch.get_num_threads(), cores()) == (1, 3)
    assert (torch.get_num_threads(), cores()) == (3, 3)


def test_the_number_is_restored_after_errors(three):
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 3


def test_blocks_of_several_threads_that_overlap_restore_the_number(three):
    both = Barrier(2, timeout=30)

    def work():
        with one_thread():
            both.wait()

    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(torch.get_num_threads())
    assert cores() == 3


def test_many_points_use_all_threads(three):
    with threads_for(torch.empty(1 << 19, 3, device="meta")):
        assert torch.get_num_threads() == 3
    with threads_for(torch.empty(1000, 3)):
        assert torch.get_num_threads() == 1


def test_callbacks_of_a_fit_have_the_threads_of_the_user(three):
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    seen = []
    gk.fit(
        gk.initialize(x, 2, generator=0),
        x,
        gk.EM(tol=0, max_iter=3),
        callback=lambda step: seen.append(torch.get_num_threads()),
        verbose=False,
    )
    assert seen == [3, 3, 3]
    assert torch.get_num_threads() == 3


def test_operations_before_an_engine_use_one_thread(three):
    few, many = torch.zeros(10, 2), torch.zeros(20_000, 2)
    with alone(few):
        assert torch.get_num_threads() == 3
    for points in (many, Batch(many), reductions.arrange(many, 3000, truncate=1e-6)):
        with alone(points):
            assert (torch.get_num_threads(), cores()) == (1, 3)
    with alone(many.to("meta")), alone("text"):
        assert torch.get_num_threads() == 3
