"""Laws of the memory that is used again: what lives is nobody else's, what dies comes back, and little of it stays idle."""

import threading

import pytest
import torch

from exlstm.ops import pages
from exlstm.ops.slstm import slstm

SIZE = pages.LARGE // 4  # float32 numbers

pytestmark = pytest.mark.skipif(not pages.KEEPS, reason="this system cannot take pages back")


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    monkeypatch.setattr(pages, "_idle", [])


def idle():
    return sum(len(held) for _, held in pages._idle)


def test_living_tensors_share_nothing_and_the_dead_come_back():
    a, b = (pages.room((SIZE,), torch.float32).fill_(value) for value in (1.0, 2.0))
    assert a.eq(1).all() and b.eq(2).all() and not pages._idle
    where, part = a.data_ptr(), a[5:6]
    del a
    assert not pages._idle and part == 1  # a view keeps all of it
    del part
    assert idle() > 0
    again = pages.room((2, SIZE // 2), torch.float32)
    assert again.data_ptr() == where and not pages._idle and b.eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_room_is_an_aligned_tensor_of_its_shape(dtype):
    for shape in ((0,), (3, 5), (SIZE + 7, 3)):
        x = pages.room(shape, dtype)
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 64 == 0


def test_idle_memory_is_bounded_in_bytes_and_in_time(monkeypatch):
    monkeypatch.setattr(pages, "IDLE_BYTES", 3 * pages.HUGE)
    held = [pages.room((SIZE,), torch.float32) for _ in range(8)]
    del held
    assert idle() == 3 * pages.HUGE
    monkeypatch.setattr(pages, "IDLE_SECONDS", -1.0)
    pages.room((SIZE,), torch.float32)
    assert idle() == 0


def test_much_larger_memory_is_not_lent_for_little():
    pages.room((16 * SIZE,), torch.float32)
    before = idle()
    small = pages.room((SIZE,), torch.float32)
    assert idle() == before and small.numel() == SIZE


def test_threads_never_share_what_lives():
    wrong = []

    def work(value):
        for _ in range(200):
            x = pages.room((SIZE,), torch.float32)
            x[::4096] = value
            if not x[::4096].eq(value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_graphs_kept_alive_keep_their_memory():
    x = torch.randn(8, 128, 2, 4, 32).requires_grad_()
    r = (torch.randn(2, 4, 32, 32) / 8).requires_grad_()
    first = slstm(x, r)[0].square().sum()
    wanted = torch.autograd.grad(first, (x, r), retain_graph=True)
    for _ in range(3):
        other = slstm(torch.randn_like(x).requires_grad_(), r)[0].sum()
        other.backward()
    assert all(map(torch.equal, torch.autograd.grad(first, (x, r)), wanted))
