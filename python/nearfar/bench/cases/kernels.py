"""Kernels: a Gram matrix, and products with Gram matrices that never store them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import nearfar as nf

from .. import reference
from ..case import CHECKED_ROWS, Array, Builder, Case, Problem, Shape, Step, first_rows, load, normal


def lengthscale(d: int) -> float:
    """sqrt(D): typical entries are about exp(-1), neither an identity matrix nor all ones."""
    return math.sqrt(d)


def _lengthscale(problem: Problem) -> float:
    return lengthscale(problem.shape["d"])


def _gram_rows(problem: Problem) -> Array:
    squared = reference.square_distances(problem["x"][:CHECKED_ROWS], problem["x"])
    rows: Array = np.exp(-squared / (2 * _lengthscale(problem) ** 2))
    return rows


# ---- Gram matrix -----------------------------------------------------------------------------------------------------


def _gram(problem: Problem) -> Step:
    kernel, x = nf.kernels.Gaussian(_lengthscale(problem)), problem["x"]
    return lambda: (kernel(x),)


def _sklearn_gram(problem: Problem) -> Step:
    metrics = load("sklearn.metrics.pairwise")
    x, gamma = problem["x"], 1 / (2 * _lengthscale(problem) ** 2)
    return lambda: (metrics.rbf_kernel(x, gamma=gamma),)


def _torch_gram(problem: Problem) -> Step:
    torch = load("torch")
    x, gamma = torch.from_numpy(problem["x"]), 1 / (2 * _lengthscale(problem) ** 2)
    return lambda: (torch.exp(-gamma * torch.cdist(x, x).pow(2)),)


GAUSSIAN_GRAM = Case(
    name="gaussian_gram",
    what="kernels.Gaussian, Gram matrix of one set",
    shapes=({"n": 4096, "d": 128},),
    quick={"n": 256, "d": 128},
    make=normal("x"),
    ours=_gram,
    peers={"sklearn": _sklearn_gram, "torch cdist": _torch_gram},
    reference=lambda problem: (_gram_rows(problem),),
    flops=lambda s: s["n"] ** 2 * s["d"],  # symmetric: half a product
    writes=lambda s: 4 * s["n"] ** 2,
    view=first_rows,
)


def _points_and_gradient(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    n = shape["n"]
    x = rng.standard_normal((n, shape["d"]), np.float32)
    return {"x": x, "g": rng.standard_normal((n, n), np.float32)}


def _gram_backward(gram: Callable[[Problem, Any], Any]) -> Builder:
    def build(problem: Problem) -> Step:
        torch = load("torch")
        x, g = torch.from_numpy(problem["x"]).requires_grad_(), torch.from_numpy(problem["g"])
        values = gram(problem, x)
        return lambda: (torch.autograd.grad(values, x, g, retain_graph=True)[0].numpy(),)

    return build


def _torch_expanded(problem: Problem, x: Any) -> Any:
    """From |x|^2 + |y|^2 - 2 <x, y>, the fastest that torch has."""
    torch = load("torch")
    squares = x.square().sum(1)
    squared = torch.addmm(squares[:, None] + squares, x, x.T, alpha=-2).clamp_min(0)
    return torch.exp(squared * (-1 / (2 * _lengthscale(problem) ** 2)))


def _gram_backward_rows(problem: Problem) -> tuple[Array, ...]:
    x, g = problem["x"].astype(np.float64), problem["g"]
    weights = _gram_rows(problem) * (g[:CHECKED_ROWS] + g[:, :CHECKED_ROWS].T) / _lengthscale(problem) ** 2
    return (weights @ x - weights.sum(1, keepdims=True) * x[:CHECKED_ROWS],)


GRAM_BACKWARD = Case(
    name="gram_backward",
    what="kernels.Gaussian, Gram matrix of one set, backward only",
    shapes=({"n": 2048, "d": 128},),
    quick={"n": 256, "d": 128},
    make=_points_and_gradient,
    ours=_gram_backward(lambda problem, x: nf.kernels.Gaussian(_lengthscale(problem))(x)),
    peers={"torch expanded": _gram_backward(_torch_expanded)},
    reference=_gram_backward_rows,
    flops=lambda s: 3 * s["n"] ** 2 * s["d"],  # symmetric: half of the scores and of both products
    view=first_rows,
)


def _histograms(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    return {name: rng.random((shape["n"], shape["d"]), np.float32) for name in ("x", "y")}


def _chi_squared_gram(problem: Problem) -> Step:
    kernel, x, y = nf.kernels.ChiSquared(1 / problem.shape["d"]), problem["x"], problem["y"]
    return lambda: (kernel(x, y),)


def _sklearn_chi_squared_gram(problem: Problem) -> Step:
    metrics = load("sklearn.metrics.pairwise")
    x, y, gamma = problem["x"], problem["y"], 1 / problem.shape["d"]
    return lambda: (metrics.chi2_kernel(x, y, gamma),)


def _chi_squared_rows(problem: Problem) -> tuple[Array]:
    x, y = problem["x"][:CHECKED_ROWS, None].astype(np.float64), problem["y"].astype(np.float64)
    return (np.exp(-((x - y) ** 2 / (x + y)).sum(-1) / problem.shape["d"]),)


CHI_SQUARED_GRAM = Case(
    name="chi_squared_gram",
    what="kernels.ChiSquared, Gram matrix of two sets",
    shapes=({"n": 2048, "d": 64},),
    quick={"n": 128, "d": 16},
    make=_histograms,
    ours=_chi_squared_gram,
    peers={"sklearn": _sklearn_chi_squared_gram},
    reference=_chi_squared_rows,
    flops=lambda s: 5 * s["n"] ** 2 * s["d"],  # a division counts as one
    writes=lambda s: 4 * s["n"] ** 2,
    view=first_rows,
)


# ---- Gram matrix times vectors ---------------------------------------------------------------------------------------

# name -> (kernel of a length scale, values of KeOps' squared distance over that of the scale, the same in NumPy)
_KERNELS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Array], Array]]] = {
    "gaussian": (
        nf.kernels.Gaussian,
        lambda r: (-r / 2).exp(),
        lambda r: np.exp(-r / 2),
    ),
    "matern": (
        nf.kernels.Matern,
        lambda r: (1 + (5 * r).sqrt() + 5 * r / 3) * (-(5 * r).sqrt()).exp(),
        lambda r: (1 + np.sqrt(5 * r) + 5 * r / 3) * np.exp(-np.sqrt(5 * r)),
    ),
    "rational_quadratic": (
        nf.kernels.RationalQuadratic,
        lambda r: 1 / (1 + r / 2),
        lambda r: 1 / (1 + r / 2),
    ),
}


def _points_and_vectors(shape: Shape, rng: np.random.Generator) -> dict[str, Array]:
    x = rng.standard_normal((shape["n"], shape["d"]), np.float32)
    return {"x": x, "v": rng.standard_normal((shape["n"], shape["columns"]), np.float32)}


def _kernel(problem: Problem, terms: tuple[str, ...]) -> Any:
    kernel, *more = (_KERNELS[name][0](_lengthscale(problem)) for name in terms)
    for other in more:
        kernel = kernel + other
    return kernel


def keops(arrays: str) -> Any:
    """KeOps' LazyTensor of arrays of "numpy" or "torch", without its messages."""
    load("pykeops").set_verbose(False)
    return load(f"pykeops.{arrays}").LazyTensor


def keops_squared_distances(lazy: Any, x: Any, y: Any) -> Any:
    """Of all pairs, not computed yet."""
    return ((lazy(x[:, None, :]) - lazy(y[None, :, :])) ** 2).sum(-1)


def keops_product(lazy: Any, x: Any, y: Any, v: Any, lengthscale: float, terms: tuple[str, ...]) -> Any:
    """The Gram matrix of a sum of kernels times v."""
    squared = keops_squared_distances(lazy, x, y) / lengthscale**2
    kernel, *more = (_KERNELS[name][1](squared) for name in terms)
    for other in more:
        kernel = kernel + other
    return kernel.__matmul__(v)


def _keops(problem: Problem, terms: tuple[str, ...]) -> Step:
    lazy, x, v = keops("numpy"), problem["x"], problem["v"]
    return lambda: (keops_product(lazy, x, x, v, _lengthscale(problem), terms),)


def _torch_chunked(problem: Problem) -> Step:
    torch = load("torch")
    x, v = torch.from_numpy(problem["x"]), torch.from_numpy(problem["v"])
    gamma = 1 / (2 * _lengthscale(problem) ** 2)

    def step() -> tuple[Any, ...]:
        rows = (torch.exp(-gamma * torch.cdist(chunk, x).pow(2)) @ v for chunk in x.split(2048))
        return (torch.cat(list(rows)),)

    return step


def _product_rows(problem: Problem, terms: tuple[str, ...]) -> tuple[Array, ...]:
    squared = reference.square_distances(problem["x"][:CHECKED_ROWS], problem["x"]) / _lengthscale(problem) ** 2
    return (sum(_KERNELS[name][2](squared) for name in terms) @ problem["v"],)


def _matmul_case(
    name: str,
    what: str,
    terms: tuple[str, ...],
    shapes: tuple[Shape, ...],
    sweep: tuple[int, ...] = (),
    **peers: Builder,
) -> Case:
    def ours(problem: Problem) -> Step:
        kernel, x, v = _kernel(problem, terms), problem["x"], problem["v"]
        return lambda: (kernel.matmul(x, x, v),)

    return Case(
        name=name,
        what=what,
        shapes=shapes,
        quick={"n": 300, "d": 3, "columns": 1},
        make=_points_and_vectors,
        ours=ours,
        peers={"KeOps": lambda problem: _keops(problem, terms), **peers},
        reference=lambda problem: _product_rows(problem, terms),
        # Symmetric: half a product for the scores. At small D the map is the floor, not these.
        flops=lambda s: s["n"] ** 2 * (s["d"] + 2 * s["columns"]),
        view=first_rows,
        sweep=sweep,
    )


GAUSSIAN_MATMUL = _matmul_case(
    "gaussian_matmul",
    "kernels.Gaussian.matmul",
    ("gaussian",),
    # A call of KeOps takes minutes at N = 20000, D = 256; both go as N^2.
    tuple({"n": 5000 if d == 256 else 20000, "d": d, "columns": c} for d in (3, 16, 64, 256) for c in (1, 16)),
    (2500, 5000, 10000, 20000, 40000, 80000),
    **{"torch chunked": _torch_chunked},
)
MATERN_MATMUL = _matmul_case(
    "matern_matmul", "kernels.Matern(nu=2.5).matmul", ("matern",), ({"n": 20000, "d": 16, "columns": 1},)
)
RATIONAL_QUADRATIC_MATMUL = _matmul_case(
    "rational_quadratic_matmul",
    "kernels.RationalQuadratic.matmul",
    ("rational_quadratic",),
    ({"n": 20000, "d": 16, "columns": 1},),
)
COMPOSED_MATMUL = _matmul_case(
    "composed_matmul",
    "matmul of a sum of Gaussian, Matern and rational quadratic",
    ("gaussian", "matern", "rational_quadratic"),
    ({"n": 20000, "d": 16, "columns": 1},),
)


# ---- its gradient ----------------------------------------------------------------------------------------------------


def _in_x(problem: Problem, kernel: Any) -> Step:
    torch = load("torch")
    x = torch.from_numpy(problem["x"]).requires_grad_()
    y, v = x.detach().clone(), torch.from_numpy(problem["v"])
    return lambda: (torch.autograd.grad(kernel.matmul(x, y, v).sum(), x)[0].numpy(),)


def _keops_in_x(problem: Problem, product: Callable[..., Any]) -> Step:
    """Of product(LazyTensor, x, y, v)."""
    torch, lazy = load("torch"), keops("torch")
    x = torch.from_numpy(problem["x"]).requires_grad_()
    y, v = x.detach().clone(), torch.from_numpy(problem["v"])
    return lambda: (torch.autograd.grad(product(lazy, x, y, v).sum(), x)[0].numpy(),)


def _matmul_gradient(problem: Problem) -> Step:
    return _in_x(problem, _kernel(problem, ("gaussian",)))


def _keops_gradient(problem: Problem) -> Step:
    def product(lazy: Any, x: Any, y: Any, v: Any) -> Any:
        return keops_product(lazy, x, y, v, _lengthscale(problem), ("gaussian",))

    return _keops_in_x(problem, product)


def _gradient_rows(problem: Problem) -> tuple[Array, ...]:
    x = problem["x"].astype(np.float64)
    weights = _gram_rows(problem) * problem["v"].sum(1) / _lengthscale(problem) ** 2
    return (weights @ x - weights.sum(1, keepdims=True) * x[:CHECKED_ROWS],)


GAUSSIAN_MATMUL_GRADIENT = Case(
    name="gaussian_matmul_gradient",
    what="kernels.Gaussian.matmul, one column: value and gradient in x",
    shapes=({"n": 20000, "d": 3, "columns": 1}, {"n": 20000, "d": 64, "columns": 1}),
    quick={"n": 300, "d": 3, "columns": 1},
    make=_points_and_vectors,
    ours=_matmul_gradient,
    peers={"KeOps": _keops_gradient},
    reference=_gradient_rows,
    flops=lambda s: 2 * s["n"] ** 2 * (3 * s["d"] + 2),
    view=first_rows,
)


# ---- the gradient of a sum of kernels with length scales of their own ------------------------------------------------

# Term -> its least and largest length scale, over sqrt(D); d value / d (squared distance over length scales).
_ARD = (("gaussian", 0.8, 1.2), ("gaussian", 1.0, 2.0), ("matern", 0.5, 1.5))
_SLOPES: dict[str, Callable[[Array], Array]] = {
    "gaussian": lambda r: np.exp(-r / 2) / -2,
    "matern": lambda r: (1 + np.sqrt(5 * r)) * np.exp(-np.sqrt(5 * r)) * (-5 / 6),
}


def _ard_scales(problem: Problem) -> list[Array]:
    return [_lengthscale(problem) * np.linspace(least, most, problem.shape["d"]) for _, least, most in _ARD]


def _ard_gradient(problem: Problem) -> Step:
    first, *more = (_KERNELS[term][0](s) for (term, _, _), s in zip(_ARD, _ard_scales(problem), strict=True))
    return _in_x(problem, sum(more, start=first))


def _keops_ard_gradient(problem: Problem) -> Step:
    torch = load("torch")
    scales = [torch.from_numpy(s.astype(np.float32)) for s in _ard_scales(problem)]

    def product(lazy: Any, x: Any, y: Any, v: Any) -> Any:
        first, *more = (
            _KERNELS[term][1](keops_squared_distances(lazy, x / s, y / s))
            for (term, _, _), s in zip(_ARD, scales, strict=True)
        )
        return sum(more, start=first) @ v

    return _keops_in_x(problem, product)


def _ard_gradient_rows(problem: Problem) -> tuple[Array, ...]:
    x, v = problem["x"].astype(np.float64), problem["v"].sum(1)
    total = np.zeros_like(x[:CHECKED_ROWS])
    for (term, _, _), s in zip(_ARD, _ard_scales(problem), strict=True):
        weights = 2 * _SLOPES[term](reference.square_distances(x[:CHECKED_ROWS] / s, x / s)) * v
        total += (weights.sum(1, keepdims=True) * x[:CHECKED_ROWS] - weights @ x) / s**2
    return (total,)


COMPOSED_MATMUL_GRADIENT = Case(
    name="composed_matmul_gradient",
    what="matmul of a sum of two Gaussians and a Matern, each with length scales of its own: value and gradient in x",
    shapes=({"n": 4000, "d": 8, "columns": 1},),
    quick={"n": 300, "d": 3, "columns": 1},
    make=_points_and_vectors,
    ours=_ard_gradient,
    peers={"KeOps": _keops_ard_gradient},
    reference=_ard_gradient_rows,
    flops=lambda s: 3 * 2 * s["n"] ** 2 * (3 * s["d"] + 2),
    view=first_rows,
)
