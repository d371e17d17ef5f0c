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


def hcl(
    z1, z2, *, temperature=None, logit_scale=None, beta=1.0, tau_plus=0.1, reduction="mean", normalize=True,
):  # fmt: skip
    """The authors' code in logs, without the floor's digits lost: R_i, then the estimate or the bound."""
    z = torch.cat([z1, z2])
    z = unit(z) if normalize else z
    n, scale = len(z1), torch.as_tensor(_scale(temperature, logit_scale, 0.5), dtype=torch.float64)
    s, index = scale * z @ z.T, torch.arange(2 * n)
    other = (index + n) % max(2 * n, 1)
    positive, m = s[index, other], 2 * n - 2
    if n < 2:
        return _reduced(0 * positive, reduction)
    out = (index[:, None] == index) | (index == other[:, None])
    r = torch.logsumexp(((1 + beta) * s).masked_fill(out, -torch.inf), 1) + np.log(m)
    ratio = r - torch.logsumexp((beta * s).masked_fill(out, -torch.inf), 1) - np.log(m) - positive
    some = ratio > (np.log(tau_plus) if tau_plus else -np.inf)
    share = torch.where(some, torch.log1p(-tau_plus * torch.exp(-torch.where(some, ratio, 1.0))), 0.0)
    estimate = torch.where(some, ratio + share - np.log1p(-tau_plus), -torch.inf)
    log_g = np.log(m) + torch.maximum(estimate, -scale - positive)
    return _reduced(torch.logaddexp(log_g, torch.zeros_like(log_g)), reduction)


def by_label(embeddings, labels, normalize):
    """Similarities, and which pairs are positives and negatives."""
    x = unit(embeddings) if normalize else embeddings
    same = labels[:, None] == labels
    return x @ x.T, same & ~torch.eye(len(x), dtype=torch.bool), ~same


def log_one_plus(logits, members, axis=1):
    """log(1 + sum over members of e^logit): the one is a logit of 0."""
    zero = torch.zeros_like(logits.sum(axis, keepdim=True))
    return torch.logsumexp(torch.cat([logits.masked_fill(~members, -torch.inf), zero], axis), axis)


def multi_similarity(embeddings, labels, *, alpha=2, beta=50, base=0.5, reduction="mean", normalize=True):
    """Equation 15 of the paper without its mining."""
    s, positive, negative = by_label(embeddings, labels, normalize)
    pull, push = log_one_plus(-alpha * (s - base), positive), log_one_plus(beta * (s - base), negative)
    return _reduced(pull / alpha + push / beta, reduction)


def circle(embeddings, labels, *, m=0.4, gamma=80, reduction="mean", normalize=True, weights=None):
    """Pair by pair, every positive with every negative; the weights are constants, of these similarities or as given."""
    s, positive, negative = by_label(embeddings, labels, normalize)
    alpha_p, alpha_n = circle_weights(s.detach(), m) if weights is None else weights
    l_p, l_n = -gamma * alpha_p * (s - 1 + m), gamma * alpha_n * (s - m)
    losses = []
    for i in range(len(s)):
        both = (l_p[i][positive[i]][:, None] + l_n[i][negative[i]]).reshape(1, -1)
        losses.append(log_one_plus(both, torch.ones_like(both, dtype=torch.bool))[0])
    loss = torch.stack(losses) if losses else s.sum(1)
    if reduction == "mean":
        return loss.sum() / max(int(positive.any(1).sum()), 1)
    return _reduced(loss, reduction)


def circle_weights(s, m):
    """Of positives and of negatives."""
    return (1 + m - s).clamp(min=0), (s + m).clamp(min=0)


def proxy_anchor(embeddings, labels, proxies, *, margin=0.1, alpha=32, normalize=True):
    """Equation 4 of the paper."""
    x, p = (unit(embeddings), unit(proxies)) if normalize else (embeddings, proxies)
    s, classes = x @ p.T, len(proxies)
    own = labels[:, None] == torch.arange(classes)
    pull, push = log_one_plus(-alpha * (s - margin), own, 0), log_one_plus(alpha * (s + margin), ~own, 0)
    return pull.sum() / max(int(own.any(0).sum()), 1) + push.sum() / classes


def dcl(z1, z2, *, temperature=None, logit_scale=None, reduction="mean", normalize=True):
    """2N anchors against the other 2N - 2 rows that are not their positive."""
    z = torch.cat([z1, z2])
    z = unit(z) if normalize else z
    n = len(z1)
    if n < 2:
        return _reduced(z.sum(1) * 0, reduction)
    s = _scale(temperature, logit_scale, 0.1) * z @ z.T
    index = torch.arange(2 * n)
    other = (index + n) % (2 * n)
    out = (index[:, None] == index) | (other[:, None] == index)
    return _reduced(torch.logsumexp(s.masked_fill(out, -torch.inf), 1) - s[index, other], reduction)


def sup_con(
    embeddings, labels=None, *, positive_mask=None, temperature=None, logit_scale=None, reduction="mean", normalize=True
):
    """Minus the mean over the positives of the log of their softmax among all other rows."""
    views = embeddings.shape[1] if embeddings.ndim == 3 else 1
    z = embeddings.reshape(-1, embeddings.shape[-1])
    z = unit(z) if normalize else z
    item = torch.arange(len(z)) // views
    if labels is not None:
        positive = labels[item][:, None] == labels[item]
    else:
        positive = item[:, None] == item
        if positive_mask is not None:
            positive = positive | torch.as_tensor(positive_mask)[item][:, item]
    positive = positive.clone().fill_diagonal_(False)
    count = positive.sum(1)
    s = _scale(temperature, logit_scale, 0.1) * z @ z.T
    if len(z) > 1:
        s = s - torch.logsumexp(s.clone().fill_diagonal_(-torch.inf), 1, keepdim=True)
    loss = -torch.where(positive, s, 0.0).sum(1) / count.clamp(min=1)
    if reduction == "none":
        return loss.reshape(embeddings.shape[:-1])
    return loss.sum() if reduction == "sum" else loss.sum() / max(int((count > 0).sum()), 1)


def n_pairs(anchor, positive, *, l2_reg=0.0, reduction="mean"):
    """Cross entropy of plain dot products, and the norms."""
    norms = (anchor**2).sum(1) + (positive**2).sum(1)
    rows = info_nce(anchor, positive, logit_scale=1.0, normalize=False, reduction="none")
    return _reduced(rows + l2_reg / 2 * norms, reduction)


def siglip(image_features, text_features, logit_scale=10.0, logit_bias=-10.0, *, reduction="mean", normalize=True):
    """-log sigmoid of every pair, the sign of the diagonal turned."""
    own = unit if normalize else (lambda z: z)
    logits = logit_scale * own(image_features) @ own(text_features).T + logit_bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return _reduced(-torch.nn.functional.logsigmoid(sign * logits).sum(1), reduction)


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


def uniformity_gap(x, *, t=2):
    """Its definition; the optimum is checked in test_sphere.py."""
    return uniformity(x, t=t).exp() - np.exp(nf.uniformity_of_sphere(x.shape[1], t))


def mi_lower_bound(query, key, *, temperature, estimator="infonce", normalize=True):
    """The three bounds from the matrix of scores."""
    query, key = (unit(query), unit(key)) if normalize else (query, key)
    s = query @ key.T / temperature
    positive, others = s.diagonal().mean(), s[~torch.eye(len(s), dtype=torch.bool)]
    if estimator == "infonce":
        return positive - torch.logsumexp(s, 1).mean() + np.log(len(s))
    log_mean = torch.logsumexp(others, 0) - np.log(len(others))
    return positive - (log_mean if estimator == "dv" else (log_mean - 1).exp())


REFERENCES = {
    nf.info_nce_loss: info_nce,
    nf.clip_loss: clip,
    nf.nt_xent_loss: nt_xent,
    nf.hcl_loss: hcl,
    nf.multi_similarity_loss: multi_similarity,
    nf.circle_loss: circle,
    nf.proxy_anchor_loss: proxy_anchor,
    nf.dcl_loss: dcl,
    nf.sup_con_loss: sup_con,
    nf.n_pairs_loss: n_pairs,
    nf.siglip_loss: siglip,
    nf.info_nce_limit: info_nce_limit,
    nf.alignment: alignment,
    nf.uniformity: uniformity,
    nf.uniformity_gap: uniformity_gap,
    nf.mi_lower_bound: mi_lower_bound,
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


def compare(f, wanted, dtype="float64", *, value_floor=0.0, floor=0.0, weights=None, gradient=None, **arguments):
    """`f` against its reference, value and gradients, at the contract's tolerances or that of `gradient`."""
    gradient = GRADIENT[dtype] if gradient is None else gradient
    value, grads = evaluate(f, wanted, weights, **arguments)
    expected, expected_grads = reference(f, wanted, weights, **arguments)
    assert_value(value, expected, VALUE[dtype], value_floor)
    for name, grad, expected_grad in zip(wanted, grads, expected_grads, strict=True):
        if name not in ("temperature", "logit_scale", "logit_bias"):
            assert grad.dtype == arguments[name].dtype
            assert_gradient(grad, expected_grad, gradient, STEP[dtype], floor)
        else:
            # The slope of a scalar can be the small difference of two large means of cosines.
            scalar_floor = 1.0 / float(arguments[name]) ** 2 if name == "temperature" else 1.0
            if arguments.get("reduction") in ("sum", "none"):
                scalar_floor *= len(arguments[wanted[0]])
            assert_gradient(grad, expected_grad, gradient, floor=0.1 * scalar_floor)
