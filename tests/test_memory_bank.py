"""The ring buffer of keys: what it holds after any sequence of batches, its state, and that gradients stop at it."""

import copy
import pickle

import pytest
import torch
from generators import of_kind, points

import nearfar as nf


def numbered(begin, end):
    """Keys that carry their number."""
    return torch.arange(begin, end, dtype=torch.float32)[:, None] * torch.ones(3)


def held(bank):
    return sorted(bank.keys[:, 0].int().tolist())


@pytest.mark.parametrize("size", [1, 2, 7, 10])
@pytest.mark.parametrize(
    "batches", [[1] * 25, [4] * 9, [3, 0, 5, 1, 10], [7, 7, 7], [25], [4, 40, 3], [10, 10], [9, 2, 9]]
)
def test_holds_the_last_keys(size, batches):
    """Any batch sizes: nothing is dropped where the buffer wraps, and of a large batch the last rows stay."""
    bank = nf.MemoryBank(size, 3)
    total = 0
    for batch in batches:
        bank.enqueue(numbered(total, total + batch))
        total += batch
        assert held(bank) == list(range(max(total - size, 0), total))
        assert len(bank) == min(total, size) == len(bank.keys)
        assert torch.equal(bank.keys, bank.keys[:, :1] * torch.ones(3))  # whole rows


def test_oldest_go_first():
    bank = nf.MemoryBank(10, 3)
    for k in range(3):
        bank.enqueue(numbered(4 * k, 4 * k + 4))
    assert held(bank) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # all four of the batch that wraps
    assert bank.keys[:, 0].tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_no_copy_unless_needed():
    """Not one of the whole queue at every step."""
    bank = nf.MemoryBank(4, 3)
    bank.enqueue(numbered(0, 4))
    memory = bank.rows.data_ptr()
    assert bank.keys.data_ptr() == memory
    assert bank.keys is bank.keys
    bank.enqueue(numbered(4, 5))
    assert bank.rows.data_ptr() == memory  # nothing holds the keys of before
    query = torch.randn(4, 3, requires_grad=True)
    nf.info_nce_loss(query, query, bank.keys).backward()
    bank.enqueue(numbered(5, 6))
    assert bank.rows.data_ptr() == memory  # nor does the graph, which is gone
    given = numbered(6, 7)
    bank.enqueue(given)
    given.zero_()
    assert held(bank) == [3, 4, 5, 6]  # the bank has its own memory


def test_keys_in_use_do_not_change():
    bank = nf.MemoryBank(4, 3)
    bank.enqueue(numbered(0, 3))
    first = bank.keys
    bank.enqueue(numbered(3, 5))
    second = bank.keys
    bank.enqueue(numbered(5, 6))
    assert first[:, 0].tolist() == [0, 1, 2]
    assert sorted(second[:, 0].tolist()) == [1, 2, 3, 4]
    assert held(bank) == [2, 3, 4, 5]


def test_no_gradient():
    bank = nf.MemoryBank(8, 3)
    x = torch.randn(4, 3, requires_grad=True)
    bank.enqueue(x * 2)
    assert not bank.keys.requires_grad
    assert list(bank.parameters()) == []
    query = torch.randn(4, 3, requires_grad=True)
    nf.info_nce_loss(query, x.detach(), bank.keys).backward()
    assert query.grad is not None
    assert x.grad is None


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_enqueue_between_loss_and_backward(in_batch, reduction):
    """The order of MoCo's loop: the loss, the queue, then backward, which still sees the keys of the loss."""
    bank = nf.MemoryBank(8, 3)
    bank.enqueue(torch.randn(8, 3))
    query, key, kept = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), bank.keys.clone()

    def slope(negatives, enqueue):
        loss = nf.info_nce_loss(query, key, negatives(), in_batch=in_batch, reduction=reduction).sum()
        if enqueue:
            bank.enqueue(key)
        (first,) = torch.autograd.grad(loss, query, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), query)[0]

    expected = slope(lambda: kept, False)
    for own, other in zip(slope(lambda: bank.keys, True), expected, strict=True):
        assert torch.equal(own, other)
    assert not torch.equal(bank.keys, kept)


def test_derived_keys_are_refused_not_wrong():
    bank = nf.MemoryBank(8, 3)
    bank.enqueue(torch.randn(8, 3))
    query = torch.randn(4, 3, requires_grad=True)
    loss = torch.logsumexp(query @ bank.keys.T, 1).sum()
    bank.enqueue(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_loss_with_a_bank():
    """log(K + 1) for equal embeddings, K what the bank holds: also before it is full."""
    bank = nf.MemoryBank(6, 3)
    ones = torch.ones(4, 3)
    for expected in (0, 4, 6, 6):
        value = nf.info_nce_loss(ones, ones, bank.keys)
        assert value.item() == pytest.approx(torch.log(torch.tensor(expected + 1.0)).item(), abs=1e-6)
        bank.enqueue(ones)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype):
    """A bank rounds what comes in to its own dtype."""
    bank = nf.MemoryBank(9, 4, dtype=getattr(torch, dtype))
    for other in ("float16", "bfloat16", "float32", "float64"):
        keys = of_kind("torch", points(5, 4), other)
        bank.enqueue(keys)
        assert bank.keys.dtype == getattr(torch, dtype)
    assert torch.equal(bank.rows[:9][[6, 7, 8, 0, 1]], keys.to(bank.rows.dtype))  # 15 to 19, at 15 % 9 and on


def test_autocast():
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 4)
    bank = nf.MemoryBank(16, 4, dtype=torch.bfloat16)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            query, key = net(torch.randn(8, 8)), net(torch.randn(8, 8)).detach()
            loss = nf.info_nce_loss(query, key, bank.keys, in_batch=True)
            assert loss.dtype == torch.float32
        loss.backward()
        bank.enqueue(key)
    wide = nf.MemoryBank(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        wide.enqueue(net(torch.randn(8, 8)))
    assert wide.keys.dtype == torch.float32


def test_state(tmp_path):
    bank = nf.MemoryBank(7, 3)
    bank.enqueue(numbered(0, 10))
    assert set(bank.state_dict()) == {"rows", "total"}
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other = nf.MemoryBank(7, 3)
    other.load_state_dict(torch.load(tmp_path / "bank.pt"))
    copies = [other, copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))]
    bank.enqueue(numbered(10, 12))
    for own in copies:
        assert held(own) == [3, 4, 5, 6, 7, 8, 9]
        own.enqueue(numbered(10, 12))
        assert torch.equal(own.keys, bank.keys)  # at the same places, too
    with pytest.raises(RuntimeError, match="size mismatch for rows"):
        nf.MemoryBank(8, 3).load_state_dict(bank.state_dict())
    partly = nf.MemoryBank(7, 3)
    partly.enqueue(numbered(0, 2))
    fresh = nf.MemoryBank(7, 3)
    fresh.load_state_dict(partly.state_dict())
    assert held(fresh) == [0, 1]
    keys = bank.keys
    assert bank.double().keys.dtype == torch.float64
    assert keys.dtype == torch.float32
    assert bank.total.dtype == torch.int64  # a counter stays one


def test_in_a_module():
    model = torch.nn.Module()
    model.bank = nf.MemoryBank(4, 3)
    model.bank.enqueue(numbered(0, 6))
    assert {"bank.rows", "bank.total"} == set(model.state_dict())
    assert repr(model.bank) == "MemoryBank(size=4, dim=3, dtype=torch.float32)"


@pytest.mark.parametrize(
    ("error", "message", "keys"),
    [
        (ValueError, "keys: expected shape (b, 3), got (4,)", torch.zeros(4)),
        (ValueError, "keys: expected shape (b, 3), got (4, 2)", torch.zeros(4, 2)),
        (TypeError, "keys: expected a floating dtype", torch.zeros(4, 3, dtype=torch.int64)),
        (TypeError, "keys: expected a torch.Tensor, got list", [[0.0] * 3]),
        (ValueError, "keys: expected device cpu to match the bank, got meta", torch.zeros(4, 3, device="meta")),
    ],
)
def test_bad_keys(error, message, keys):
    bank = nf.MemoryBank(4, 3)
    with pytest.raises(error) as caught:
        bank.enqueue(keys)
    assert str(caught.value).startswith(message)
    assert len(bank) == 0


@pytest.mark.parametrize("arguments", [(0, 3), (-1, 3), (3, 0), (1.5, 3), (True, 3), ("4", 3)])
def test_bad_sizes(arguments):
    with pytest.raises((ValueError, TypeError), match=r"^(size|dim): expected"):
        nf.MemoryBank(*arguments)
    with pytest.raises(TypeError, match=r"^dtype: expected one of"):
        nf.MemoryBank(3, 3, dtype=torch.int64)
