"""One block of a softmax that is spread over processes: log-sum-exps of rows and columns, gradients by whole ones; and
a block of the sigmoid loss without matches. On the CPU, and in emulation where a build has it."""

import numpy as np
import pytest
import torch

from nearfar import _core, backend, loss_operations

pytestmark = pytest.mark.isa
CUDA = getattr(_core, "cuda", None)
SHAPES = [(1, 1), (2, 3), (1, 130), (129, 1), (127, 128), (128, 300), (131, 257)]
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}


@pytest.fixture(params=["cpu", "emulated"], autouse=True)
def where(request, monkeypatch):
    if request.param == "emulated":
        if CUDA is None or not CUDA.emulated:
            pytest.skip("this build does not emulate a GPU")
        monkeypatch.setattr(backend, "emulate", True)
    return request.param


def points(n, m, d, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, d, generator=g, dtype=torch.float64).to(getattr(torch, dtype)) for rows in (n, m)]


def scores(x, y, scale, normalize, ids):
    x, y = x.double(), y.double()
    if normalize:
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    s = scale * x @ y.T
    return s if ids is None else s.masked_fill(ids[0][:, None] == ids[1], -torch.inf)


def assert_gradients(got, wanted, terms, tolerance):
    """Of points; then of numbers, whose `terms`, one for each pair, may cancel: rounding is relative to their size."""
    sizes = [max(float(want.norm()), 1e-3) for want in wanted[: -len(terms)]]
    sizes += [max(float(term.abs().sum()), 1e-3) for term in terms]
    for own, want, size in zip(got, wanted, sizes, strict=True):
        assert float((own.double() - want).norm()) <= tolerance * size


def off(got, want):
    """The largest error, relative to the largest number; infinities must agree."""
    got, want = got.double(), want.double()
    same = torch.isinf(want)
    assert torch.equal(got[same], want[same])
    if same.all():
        return 0.0
    return float((got - want)[~same].abs().max() / want[~same].abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize(
    ("scale", "normalize", "with_ids"), [(5.0, True, True), (100.0, True, False), (0.5, False, True)]
)
def test_block(n, m, dtype, scale, normalize, with_ids):
    x, y = points(n, m, 19, dtype)
    ids = (torch.arange(n) % 5, torch.arange(m) % 3) if with_ids else None
    pair = ids or (None, None)
    lse, of_columns = loss_operations.softmax_block(x, y, scale, *pair, normalize, True)
    leaves = [z.double().clone().requires_grad_() for z in (x, y)]
    t = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    s = scores(*leaves, t, normalize, ids)
    tolerance = TOLERANCE[dtype] * (10 if scale == 100 else 1)
    assert off(lse, s.detach().logsumexp(1)) < tolerance
    assert off(of_columns, s.detach().logsumexp(0)) < tolerance
    alone, nothing = loss_operations.softmax_block(x, y, scale, *pair, normalize, False)
    assert nothing is None
    assert off(alone, s.detach().logsumexp(1)) < tolerance

    # Normalisers of more than this block, and any weights.
    a, b = torch.logaddexp(lse, torch.zeros(())), torch.logaddexp(of_columns, torch.ones(()))
    u, v = torch.rand(n, dtype=torch.float64), torch.rand(m, dtype=torch.float64)
    for columns in (None, (b, v)):
        total = (u[:, None] * torch.exp(s - a[:, None])).sum()
        if columns:
            total = total + (v * torch.exp(s - b)).sum()
        *wanted, by_scores = torch.autograd.grad(total, (*leaves, t, s), retain_graph=True)
        got = loss_operations.softmax_block_grad(x, y, scale, *pair, normalize, (a, u), columns)
        assert_gradients(got, wanted, [by_scores * s.detach().nan_to_num(neginf=0) / scale], 10 * tolerance)


@pytest.mark.parametrize("n", [1, 2, 129, 260])
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_one_set(n, scale):
    """y None: a row is not its own column, and both roles of a row are in its gradient."""
    x, _ = points(n, 1, 7, "float64")
    item = torch.arange(n) // 2
    lse, nothing = loss_operations.softmax_block(x, None, scale, item, item, True, False)
    leaf = x.clone().requires_grad_()
    s = scores(leaf, leaf, scale, True, (item, item))
    assert nothing is None
    assert off(lse, s.detach().logsumexp(1)) < 1e-12
    u = torch.rand(n, dtype=torch.float64)
    a = torch.logaddexp(lse, torch.zeros(()))
    (want,) = torch.autograd.grad((u[:, None] * torch.exp(s - a[:, None])).sum(), leaf)
    dx, dy, _ = loss_operations.softmax_block_grad(x, None, scale, item, item, True, (a, u), None)
    assert dy is None
    assert float((dx - want).norm()) <= 1e-11 * max(float(want.norm()), 1e-3)


def test_not_a_number(where):
    """Touches its own row, and every column."""
    x, y = points(70, 40, 5, "float32")
    x[3, 2] = torch.nan
    lse, of_columns = loss_operations.softmax_block(x, y, 3.0, None, None, False, True)
    assert torch.isnan(lse).nonzero().ravel().tolist() == [3]
    assert torch.isnan(of_columns).all()


def test_threads(where, threads):
    if where != "cpu":
        return
    x, y = points(300, 700, 33, "float32")
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        lse = loss_operations.softmax_block(x, y, 9.0, None, None, True, True)
        grads = loss_operations.softmax_block_grad(
            x, y, 9.0, None, None, True, (lse[0], torch.ones_like(lse[0])), (lse[1], torch.ones_like(lse[1]))
        )
        results.append([part.numpy().tobytes() for part in (*lse, *grads)])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_sigmoid_without_matches(n, m, dtype):
    x, y = points(n, m, 19, dtype)
    leaves = [z.double().clone().requires_grad_() for z in (x, y)]
    t, b = (torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in (7.0, -2.0))
    s = scores(*leaves, t, True, None)
    losses = torch.nn.functional.softplus(s + b, threshold=50).sum(1)
    weights = torch.rand(n, dtype=torch.float64).to(torch.float64 if dtype == "float64" else torch.float32)
    *wanted, by_scores = torch.autograd.grad((losses * weights.double()).sum(), (*leaves, t, b, s))
    got, *grads = loss_operations.sigmoid(weights, x, y, 7.0, -2.0, "none", True, "0123", False)
    assert off(got, losses.detach()) < TOLERANCE[dtype]
    assert_gradients(grads, wanted, [by_scores * s.detach() / 7, by_scores], 10 * TOLERANCE[dtype])


def test_bad_calls():
    x = np.ones((3, 2))
    out, ids = np.empty(3), np.zeros(3, np.int32)
    call = [x, x, False, None, None, 1.0, True, out, None, None, None, None, None, 1]
    if backend.emulate:
        return
    for place, value, message in (
        (1, np.ones((3, 5)), "y: expected shape"),
        (3, ids, "ids_y: expected ids of both or none"),
        (3, np.zeros(2, np.int32), "ids_x: expected shape"),
        (7, np.empty(4), "lse_x"),
        (11, np.zeros((3, 2)), "dx: expected all gradients or none"),
    ):
        changed = list(call)
        changed[place] = value
        with pytest.raises(ValueError, match=message):
            _core.softmax_block(*changed)
