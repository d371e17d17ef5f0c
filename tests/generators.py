"""Shared by the tests: arrays of every layout, and dense float64 references that follow the definitions word by word.

References are plain torch formulas on the whole N x M matrix in float64, differentiated by autograd. Errors are judged
by the contract: a value relative to itself, a gradient relative to its norm.
"""

import inspect

import numpy as np
import torch

import nearfar as nf

VALUE = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-12}
GRADIENT = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-12}
STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0, "float64": 0.0}  # rounding of a stored gradient

# Around the engine's sizes: tiles of 6 and 12, panels of 16 and 32, strips of 128, chunks of 240, depth cut at 256.
SIZES = (0, 1, 2, 3, 7, 11, 12, 13, 31, 32, 33, 47, 48, 49, 61, 127, 128, 129, 239, 240, 241, 251, 252, 253)
DEPTHS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128)
DEPTHS += (255, 256, 257, 384, 385, 641)


def rng(*seed):
    """A generator of its own for every test case."""
    return np.random.default_rng([20260101, *seed])


def points(n, d, dtype="float64", seed=0):
    """(n, d) Gaussian points with norms between 0.5 and 2 times the usual one."""
    generator = rng(n, d, seed)
    x = generator.standard_normal((n, d)) * generator.uniform(0.5, 2, (n, 1))
    return x.astype(dtype)


def pairs(n, d, dtype="float64", noise=0.7, seed=0):
    """Two views (n, d) of the same points."""
    x = points(n, d, seed=seed)
    return x.astype(dtype), (x + noise * points(n, d, seed=seed + 1000)).astype(dtype)


def of_kind(kind, array, dtype=None):
    """The array as NumPy or torch, in a dtype (bfloat16 for torch only)."""
    if array is None:
        return None
    if kind == "numpy":
        return np.asarray(array, dtype)
    tensor = torch.from_numpy(np.array(array))
    return tensor if dtype is None else tensor.to(getattr(torch, str(dtype)))


def numpy_of(array):
    """float64 NumPy values of whatever kind and dtype."""
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().to(torch.float64).numpy()
    return np.asarray(array, np.float64)


def layouts(x):
    """The same values in every memory layout that NumPy has."""
    x = np.ascontiguousarray(x)
    n, d = x.shape[-2:]
    wide = np.full((*x.shape[:-2], 2 * n, 3 * d), np.nan, x.dtype)
    wide[..., ::2, 1::3] = x
    readonly = x.copy()
    readonly.flags.writeable = False
    return {
        "contiguous": x,
        "fortran": np.asfortranarray(x),
        "strided": wide[..., ::2, 1::3],
        "negative rows": np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :],
        "negative columns": np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        "read-only": readonly,
    }


# ---- references ------------------------------------------------------------------------------------------------------


def unit(x):
    """Rows of unit norm; a zero row stays zero with zero derivatives."""
    square = (x * x).sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, square).sqrt())


def _reduced(loss, reduction):
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(len(loss), 1)


def _scale(temperature, logit_scale, default):
    if logit_scale is not None:
        return logit_scale
    return 1 / (default if temperature is None else temperature)


def info_nce(
    query, positive_key, negative_keys=None, *, temperature=None, logit_scale=None, in_batch=None, symmetric=False,
    ids=None, reduction="mean", normalize=True,
):  # fmt: skip
    """Row by row: the positive, then whatever else is in the denominator."""
    if symmetric:
        common = dict(
            temperature=temperature, logit_scale=logit_scale, ids=ids, reduction=reduction, normalize=normalize
        )
        return (info_nce(query, positive_key, **common) + info_nce(positive_key, query, **common)) / 2
    in_batch = negative_keys is None if in_batch is None else in_batch
    scale = _scale(temperature, logit_scale, 0.07)
    own = unit if normalize else (lambda z: z)
    q, k = own(query), own(positive_key)
    n = len(q)
    s_positive = scale * (q * k).sum(1)
    terms = [s_positive[:, None]]
    if in_batch:
        out = torch.eye(n, dtype=torch.bool)
        if ids is not None:
            out = out | (ids[:, None] == ids)
        terms.append((scale * q @ k.T).masked_fill(out, -torch.inf))
    if negative_keys is not None:
        negatives = own(negative_keys)
        s = q @ negatives.T if negatives.ndim == 2 else (q[:, None] * negatives).sum(-1)
        terms.append(scale * s)
    return _reduced(torch.logsumexp(torch.cat(terms, 1), 1) - s_positive, reduction)


def clip(image_features, text_features, logit_scale=1 / 0.07, *, reduction="mean", normalize=True):
    """The mean of both cross entropies."""
    own = unit if normalize else (lambda z: z)
    s = logit_scale * own(image_features) @ own(text_features).T
    both = (torch.logsumexp(s, 0) + torch.logsumexp(s, 1)) / 2 if len(s) else s.sum(1)
    return _reduced(both - s.diagonal(), reduction)


def nt_xent(z1, z2, *, temperature=None, logit_scale=None, reduction="mean", normalize=True):
    """2N anchors against the other 2N - 1."""
    z = torch.cat([z1, z2])
    z = unit(z) if normalize else z
    n = len(z1)
    s = _scale(temperature, logit_scale, 0.5) * z @ z.T
    index = torch.arange(2 * n)
    s_positive = s[index, (index + n) % max(2 * n, 1)]
    if n:
        s_positive = torch.logsumexp(s.masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf), 1) - s_positive
    return _reduced(s_positive, reduction)


def info_nce_limit(x, y, temperature):
    """Theorem 1 of Wang & Isola as it stands."""
    x, y = unit(x), unit(y)
    log_mean = torch.logsumexp(x @ x.T / temperature, 1) - np.log(len(x))
    return -(x * y).sum(1).mean() / temperature + log_mean.mean()


def alignment(x, y, *, alpha=2, normalize=True, reduction="mean"):
    """|x_i - y_i|^alpha, with slope 0 at distance 0."""
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    square = ((x - y) ** 2).sum(1)
    return _reduced(torch.where(square > 0, torch.where(square > 0, square, 1.0) ** (alpha / 2), 0.0), reduction)


def uniformity(x, *, t=2, normalize=True):
    """A log-mean-exp over i < j."""
    x = unit(x) if normalize else x
    i, j = torch.triu_indices(len(x), len(x), 1)
    square = ((x[i] - x[j]) ** 2).sum(1)
    return torch.logsumexp(-t * square, 0) - np.log(len(square))


REFERENCES = {
    nf.info_nce_loss: info_nce,
    nf.clip_loss: clip,
    nf.nt_xent_loss: nt_xent,
    nf.info_nce_limit: info_nce_limit,
    nf.alignment: alignment,
    nf.uniformity: uniformity,
}


# ---- comparisons -----------------------------------------------------------------------------------------------------


def _wide(value):
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.to(torch.float64) if value.is_floating_point() else value
    return value


def reference(f, wanted, weights=None, **arguments):
    """Value and gradients of the dense float64 form of `f`; `weights` is the upstream gradient of reduction 'none'."""
    arguments = {name: _wide(value) for name, value in arguments.items()}
    for name in wanted:
        arguments[name] = torch.as_tensor(arguments[name], dtype=torch.float64).requires_grad_()
    value = REFERENCES[f](**arguments)
    total = value.sum() if weights is None else (value * _wide(weights)).sum()
    grads = torch.autograd.grad(total, [arguments[name] for name in wanted], allow_unused=True, materialize_grads=True)
    return value.detach().numpy(), [g.numpy() for g in grads]


def evaluate(f, wanted, weights=None, **arguments):
    """Value and gradients of `f` itself, by `value_and_grad`; by torch where there are upstream weights."""
    if weights is None:
        names = list(inspect.signature(f).parameters)
        return nf.value_and_grad(f, [names.index(name) for name in wanted])(**arguments)
    for name in wanted:
        arguments[name] = arguments[name].detach().requires_grad_()
    value = f(**arguments)
    return value.detach(), torch.autograd.grad((value * weights).sum(), [arguments[name] for name in wanted])


def assert_value(actual, expected, tolerance, floor=0.0):
    """Each entry relative to itself, or to `floor` where it is smaller."""
    actual, expected = numpy_of(actual), numpy_of(expected)
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) / np.maximum(np.maximum(np.abs(expected), floor), np.finfo(float).tiny)
    if excess.size and not np.all(excess <= tolerance):
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(f"{actual[worst]} at {worst}, expected {expected[worst]}: relative {excess[worst]:.3g}")


def assert_gradient(actual, expected, tolerance, step=0.0, floor=0.0):
    """Error's norm relative to the gradient's norm, or to `floor`; `step` is the relative rounding of storage."""
    actual, expected = numpy_of(actual), numpy_of(expected)
    assert actual.shape == expected.shape
    rounding = step * np.abs(expected) + (2.0**-24 if step == STEP["float16"] else 0)
    error = np.linalg.norm(np.maximum(np.abs(actual - expected) - rounding, 0))
    bound = tolerance * max(np.linalg.norm(expected), floor)
    assert error <= bound, f"error {error:.3g} of norm {np.linalg.norm(expected):.3g}, allowed {bound:.3g}"


def compare(f, wanted, dtype="float64", *, value_floor=0.0, floor=0.0, weights=None, **arguments):
    """`f` against its reference, value and gradients, at the contract's tolerances."""
    value, grads = evaluate(f, wanted, weights, **arguments)
    expected, expected_grads = reference(f, wanted, weights, **arguments)
    assert_value(value, expected, VALUE[dtype], value_floor)
    for name, grad, expected_grad in zip(wanted, grads, expected_grads, strict=True):
        if name not in ("temperature", "logit_scale"):
            assert grad.dtype == arguments[name].dtype
            assert_gradient(grad, expected_grad, GRADIENT[dtype], STEP[dtype], floor)
        else:
            # The slope of a scalar can be the small difference of two large means of cosines.
            scalar_floor = 1.0 if name == "logit_scale" else 1.0 / float(arguments[name]) ** 2
            if arguments.get("reduction") in ("sum", "none"):
                scalar_floor *= len(arguments[wanted[0]])
            assert_gradient(grad, expected_grad, GRADIENT[dtype], floor=0.1 * scalar_floor)
