"""Number of threads within operations on small tensors."""

from __future__ import annotations

from threading import Barrier, Event, Thread

import pytest
import torch

import gmmkeops as gk
from gmmkeops.reductions.cores import alone, cores, one_thread, threads_for, user_threads
from gmmkeops.reductions.keops import formulas


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
    with alone(many):
        assert (torch.get_num_threads(), cores()) == (1, 3)
    with alone(many.to("meta")), alone("text"):
        assert torch.get_num_threads() == 3


def test_each_thread_gets_its_own_number_back(three):
    """Blocks of two threads overlap; one of them uses torch for the first time within the block of the other."""
    seen, steps = {}, [Event() for _ in range(4)]

    def first():
        assert torch.get_num_threads() == 3
        with one_thread():
            steps[0].set()
            assert steps[1].wait(30)
        seen["first"] = torch.get_num_threads(), cores()
        steps[2].set()

    def second():
        assert steps[0].wait(30)
        with one_thread():
            seen["inside"] = cores()
            steps[1].set()
            assert steps[2].wait(30)
        seen["second"] = torch.get_num_threads(), cores()

    threads = [Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": (3, 3), "inside": 3, "second": (3, 3)}
    assert (torch.get_num_threads(), cores()) == (3, 3)


def test_reductions_in_callbacks_leave_the_threads_of_the_user(three):
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    seen = []

    def callback(step):
        gk.reductions.argmax(x, torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 1))
        seen.append((torch.get_num_threads(), cores()))

    gk.fit(gk.initialize(x, 2, generator=0), x, gk.EM(tol=0, max_iter=2), callback=callback, verbose=False)
    assert seen == [(3, 3), (3, 3)]
    assert torch.get_num_threads() == 3


@pytest.mark.keops
@pytest.mark.skipif(gk.reductions.keops_unavailable(torch.device("cpu")) is not None, reason="KeOps is not available")
def test_keops_uses_the_threads_of_the_user(three, monkeypatch):
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    seen, called = [], formulas._called

    def spy(problem, reduction, *arguments, **options):
        def counted(*args, **more):
            seen.append(torch.get_num_threads())
            return reduction(*args, **more)

        return called(problem, counted, *arguments, **options)

    monkeypatch.setattr(formulas, "_called", spy)
    gk.fit(gk.initialize(x, 2, generator=0), x, gk.EM(tol=0, max_iter=1), backend="keops", truncate=0, verbose=False)
    assert seen
    assert set(seen) == {3}
