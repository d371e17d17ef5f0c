"""Gradients for NumPy users: every argument, however it is named, equals the dense form and torch."""

import functools

import numpy as np
import pytest
import torch
from generators import assert_gradient, assert_value, compare, of_kind, pairs, points, reference

import nearfar as nf

X, Y = pairs(40, 9)
SHARED, OWN = points(31, 9), points(120, 9).reshape(40, 3, 9)

# What can be differentiated in each call; scalars are numbers for NumPy and 0-d tensors for torch.
CASES = {
    "in batch": (nf.info_nce_loss, {"query": X, "positive_key": Y, "temperature": 0.3}),
    "logit_scale": (nf.info_nce_loss, {"query": X, "positive_key": Y, "logit_scale": 4.0}),
    "symmetric": (nf.info_nce_loss, {"query": X, "positive_key": Y, "temperature": 0.3, "symmetric": True}),
    "shared": (nf.info_nce_loss, {"query": X, "positive_key": Y, "negative_keys": SHARED, "temperature": 0.3}),
    "own": (nf.info_nce_loss, {"query": X, "positive_key": Y, "negative_keys": OWN, "temperature": 0.3}),
    "shared and in batch": (
        nf.info_nce_loss,
        {"query": X, "positive_key": Y, "negative_keys": SHARED, "in_batch": True, "temperature": 0.3},
    ),
    "own and in batch": (
        nf.info_nce_loss,
        {"query": X, "positive_key": Y, "negative_keys": OWN, "in_batch": True, "logit_scale": 4.0},
    ),
    "plain": (nf.info_nce_loss, {"query": X, "positive_key": Y, "temperature": 2.0, "normalize": False}),
    "sum": (nf.info_nce_loss, {"query": X, "positive_key": Y, "temperature": 0.3, "reduction": "sum"}),
    "clip": (nf.clip_loss, {"image_features": X, "text_features": Y, "logit_scale": 4.0}),
    "nt_xent": (nf.nt_xent_loss, {"z1": X, "z2": Y, "temperature": 0.3}),
    "dcl": (nf.dcl_loss, {"z1": X, "z2": Y, "temperature": 0.3}),
    "sup_con": (nf.sup_con_loss, {"embeddings": X, "labels": np.arange(40) % 7, "temperature": 0.3}),
    "sup_con mask": (nf.sup_con_loss, {"embeddings": X, "positive_mask": X @ Y.T > 1, "logit_scale": 3.0}),
    "sup_con views": (nf.sup_con_loss, {"embeddings": OWN, "temperature": 0.3}),
    "n_pairs": (nf.n_pairs_loss, {"anchor": X / 4, "positive": Y / 4, "l2_reg": 0.2}),
    "siglip": (
        nf.siglip_loss,
        {"image_features": X, "text_features": Y, "logit_scale": 4.0, "logit_bias": -2.0},
    ),
    "limit": (nf.info_nce_limit, {"x": X, "y": Y, "temperature": 0.3}),
    "alignment": (nf.alignment, {"x": X, "y": Y, "alpha": 3}),
    "uniformity": (nf.uniformity, {"x": X, "t": 1.5}),
    "uniformity gap": (nf.uniformity_gap, {"x": X, "t": 1.5}),
    "mutual information": (nf.mi_lower_bound, {"query": X, "key": Y, "temperature": 0.3}),
    "mutual information, dv": (nf.mi_lower_bound, {"query": X, "key": Y, "temperature": 0.3, "estimator": "dv"}),
    "mutual information, nwj": (
        nf.mi_lower_bound,
        {"query": X / 4, "key": Y / 4, "temperature": 0.7, "estimator": "nwj", "normalize": False},
    ),
}
OPTIONS = ("symmetric", "in_batch", "normalize", "reduction", "alpha", "t", "labels", "positive_mask", "l2_reg")
OPTIONS += ("estimator",)
SCALARS = ("temperature", "logit_scale", "logit_bias")
cases = pytest.mark.parametrize(("f", "arguments"), CASES.values(), ids=CASES)


def argnums_of(f, wanted):
    import inspect

    names = list(inspect.signature(f).parameters)
    return tuple(names.index(name) for name in wanted)


@cases
def test_every_argument(f, arguments):
    wanted = [name for name in arguments if name not in OPTIONS]
    compare(f, wanted, **arguments)


@cases
def test_equals_torch(f, arguments):
    wanted = [name for name in arguments if name not in OPTIONS]
    own = {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arguments.items()}
    own |= {name: torch.tensor(arguments[name], dtype=torch.float64) for name in wanted}
    value, grads = nf.value_and_grad(f, argnums_of(f, wanted))(**arguments)
    torch_value, torch_grads = nf.value_and_grad(f, argnums_of(f, wanted))(**own)
    assert isinstance(value, np.float64)
    assert isinstance(torch_value, torch.Tensor)
    assert not torch_value.requires_grad
    # What is computed from an operation's result is computed by either library in its own order.
    rtol = 1e-14 if f in (nf.uniformity_gap, nf.mi_lower_bound) else 0
    assert value == pytest.approx(torch_value.item(), rel=rtol, abs=0)
    for name, grad, torch_grad in zip(wanted, grads, torch_grads, strict=True):
        if name in SCALARS:
            assert grad == pytest.approx(torch_grad.item(), rel=1e-14)
        else:
            assert np.linalg.norm(grad - torch_grad.numpy()) <= rtol * np.linalg.norm(grad)


@cases
def test_one_argument_at_a_time(f, arguments):
    """The gradient of one argument does not depend on which others are asked for."""
    wanted = [name for name in arguments if name not in OPTIONS]
    _, grads = nf.value_and_grad(f, argnums_of(f, wanted))(**arguments)
    for argnum, grad in zip(argnums_of(f, wanted), grads, strict=True):
        value, own = nf.value_and_grad(f, argnum)(**arguments)
        assert np.array_equal(own, grad)
        assert value == f(**arguments)


@cases
def test_finite_differences(f, arguments):
    """Against nothing but the function itself."""
    wanted = [name for name in arguments if name not in OPTIONS]
    _, grads = nf.value_and_grad(f, argnums_of(f, wanted))(**arguments)
    for name, grad in zip(wanted, grads, strict=True):
        direction = points(max(np.size(arguments[name]), 1), 1).reshape(np.shape(arguments[name]))
        direction = direction / np.linalg.norm(direction)
        up, down = (f(**(arguments | {name: arguments[name] + h * direction})) for h in (1e-5, -1e-5))
        assert (up - down) / 2e-5 == pytest.approx(float((grad * direction).sum()), rel=1e-6, abs=1e-8)


def test_positional_and_keyword_are_the_same():
    f = nf.info_nce_loss
    a = nf.value_and_grad(f, (0, 2, 3))(X, Y, SHARED, temperature=0.2)
    b = nf.value_and_grad(f, (0, 2, 3))(query=X, positive_key=Y, negative_keys=SHARED, temperature=0.2)
    assert a[0] == b[0]
    assert all(np.array_equal(u, v) for u, v in zip(a[1], b[1], strict=True))


def test_some_arguments_given_before():
    whole = nf.value_and_grad(nf.info_nce_loss, argnums=(1, 3))(X, Y, temperature=0.3)
    some = functools.partial(functools.partial(nf.info_nce_loss, X), temperature=0.3)
    value, (dy, dtemperature) = nf.value_and_grad(some, argnums=(0, 2))(Y)
    assert (value, dtemperature) == (whole[0], whole[1][1])
    assert np.array_equal(dy, whole[1][0])


def test_argnums():
    value, grad = nf.value_and_grad(nf.info_nce_loss)(X, Y)
    assert grad.shape == X.shape
    for argnums in (1, np.int64(1), -9):
        assert nf.value_and_grad(nf.info_nce_loss, argnums)(X, Y)[1].shape == Y.shape
    dx, dy = nf.value_and_grad(nf.info_nce_loss, (0, 1))(X, Y)[1]
    swapped = nf.value_and_grad(nf.info_nce_loss, [1, 0])(X, Y)[1]
    assert isinstance(swapped, tuple)
    assert np.array_equal(swapped[0], dy)
    assert np.array_equal(swapped[1], dx)
    assert nf.value_and_grad(nf.info_nce_loss, ())(X, Y) == (value, ())
    (once,) = nf.value_and_grad(nf.info_nce_loss, (0,))(X, Y)[1]
    assert np.array_equal(once, grad)
    again = nf.value_and_grad(nf.info_nce_loss, (0, 0))(X, Y)[1]
    assert np.array_equal(again[0], again[1])
    # The temperature has a gradient where it is the default, too.
    default = nf.value_and_grad(nf.info_nce_loss, 3)(X, Y)[1]
    assert default == nf.value_and_grad(nf.info_nce_loss, 3)(X, Y, temperature=0.07)[1]


def test_one_array_twice():
    _, (dx, dy) = nf.value_and_grad(nf.info_nce_loss, (0, 1))(X, X)
    _, expected = reference(nf.info_nce_loss, ["query", "positive_key"], query=X, positive_key=X)
    assert_gradient(dx, expected[0], 1e-12)
    assert_gradient(dy, expected[1], 1e-12)
    # x stands in two places of the limit, with one gradient.
    compare(nf.info_nce_limit, ["x"], x=X, y=X, temperature=0.4)
    half = X.astype(np.float16)
    own, exact = (nf.value_and_grad(nf.info_nce_limit)(x, x, 0.4)[1] for x in (half, half.astype(np.float32)))
    assert np.array_equal(own, exact.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_types(dtype):
    x, y = X.astype(dtype), Y.astype(dtype)
    value, (dx, dy, dtemperature) = nf.value_and_grad(nf.info_nce_loss, (0, 1, 3))(x, y, temperature=0.3)
    assert value.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert isinstance(value, np.floating)
    assert dx.dtype == dy.dtype == x.dtype
    assert isinstance(dtemperature, float)
    assert dx.flags.writeable
    assert dx.flags.c_contiguous


def test_inputs_are_not_touched():
    x, y = X.copy(), Y.copy()
    nf.value_and_grad(nf.nt_xent_loss, (0, 1))(x, y)
    nf.value_and_grad(nf.uniformity)(x)
    assert np.array_equal(x, X)
    assert np.array_equal(y, Y)
    leaf = torch.from_numpy(x).requires_grad_()
    nf.value_and_grad(nf.info_nce_loss)(leaf, torch.from_numpy(y))
    assert leaf.grad is None


def test_gradient_step_lowers_the_loss():
    x, y = X.copy(), Y.copy()
    value_and_grad = nf.value_and_grad(nf.nt_xent_loss, (0, 1))
    first, _ = value_and_grad(x, y)
    for _ in range(30):
        value, (dx, dy) = value_and_grad(x, y)
        x, y = x - 20 * dx, y - 20 * dy
    assert value < 0.9 * first


def test_any_scalar_function_of_torch():
    x, y = (of_kind("torch", a) for a in (X, Y))

    def f(x, y, weight):
        return nf.alignment(x, y) + weight * (nf.uniformity(x) + nf.uniformity(y)) / 2

    value, (dx, dweight) = nf.value_and_grad(f, (0, 2))(x, y, torch.tensor(0.5))
    assert_value(value, nf.alignment(X, Y) + 0.25 * (nf.uniformity(X) + nf.uniformity(Y)), 1e-12)
    assert dx.shape == x.shape
    assert dweight == pytest.approx((nf.uniformity(X) + nf.uniformity(Y)) / 2)


def test_module():
    x, y = (of_kind("torch", a) for a in (X, Y))
    value, (dx, dy) = nf.value_and_grad(nf.InfoNCELoss(0.3), (0, 1))(x, y)
    expected, grads = nf.value_and_grad(nf.info_nce_loss, (0, 1))(x, y, temperature=0.3)
    assert torch.equal(value, expected)
    assert torch.equal(dx, grads[0])
    assert torch.equal(dy, grads[1])


def test_torch_without_grad_mode():
    x, y = (of_kind("torch", a) for a in (X, Y))
    expected = nf.value_and_grad(nf.info_nce_loss)(x, y)
    with torch.no_grad():
        value, grad = nf.value_and_grad(nf.info_nce_loss)(x, y)
    assert value == expected[0]
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("argnums", [1.5, "query", None, (0, 0.5), ("query",)])
def test_argnums_of_a_wrong_type(argnums):
    with pytest.raises(TypeError, match=r"^argnums: expected an int or a sequence of ints"):
        nf.value_and_grad(nf.info_nce_loss, argnums)


@pytest.mark.parametrize("argnums", [10, -11])
def test_argnums_out_of_range(argnums, kind):
    with pytest.raises(ValueError, match=r"^argnums: expected a parameter of \['query'.*, got -?1"):
        nf.value_and_grad(nf.info_nce_loss, argnums)(of_kind(kind, X), of_kind(kind, Y))


@pytest.mark.parametrize("name", ["negative_keys", "logit_scale", "ids", "reduction"])
def test_no_gradient(name, kind):
    (argnum,) = argnums_of(nf.info_nce_loss, [name])
    with pytest.raises(ValueError, match=rf"^argnums: {name} (has no gradient|is not a floating tensor)"):
        nf.value_and_grad(nf.info_nce_loss, argnum)(
            of_kind(kind, X), of_kind(kind, Y), ids=of_kind(kind, np.arange(40)), temperature=0.1
        )


def test_not_a_scalar(kind):
    with pytest.raises(ValueError, match=r"^f: expected a scalar value \(reduction 'mean' or 'sum'\)"):
        nf.value_and_grad(nf.info_nce_loss)(of_kind(kind, X), of_kind(kind, Y), reduction="none")
    with pytest.raises(ValueError, match=r"^f: expected a scalar value"):
        nf.value_and_grad(nf.cdist)(of_kind("torch", X))


def test_not_differentiable():
    for f, name in ((nf.cdist, "cdist"), (np.sum, "sum"), (lambda x: x, "<lambda>")):
        with pytest.raises(
            TypeError,
            match=rf"^f: expected a differentiable function of nearfar for NumPy arguments, got {name}; other",
        ):
            nf.value_and_grad(f)(X)


def test_errors_of_the_loss_come_through(kind):
    with pytest.raises(ValueError, match=r"^positive_key: expected shape \(40, 9\) to match query, got \(39, 9\)"):
        nf.value_and_grad(nf.info_nce_loss)(of_kind(kind, X), of_kind(kind, Y[1:]))


def test_no_arguments_at_all():
    x = np.eye(3)
    value, grads = nf.value_and_grad(nf.info_nce_loss, ())(x, x)
    assert grads == ()
    assert value == nf.info_nce_loss(x, x)
