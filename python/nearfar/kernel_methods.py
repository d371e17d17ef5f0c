"""Kernel ridge regression and kernel principal components, without the Gram matrix.

Ridge: ``(K + alpha I) beta = y`` by conjugate gradients, all targets in one fused product a step, preconditioned by
``L L^T + alpha I`` with a low-rank factor L of K: the eigenvalues of K that L holds no longer slow it down. Components:
block Lanczos on ``H K H``, ``H = I - 1 1^T / n``, where H is two means.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, cast, check_seed, common_center, device_name, finite, integer, is_torch, of_kind, to_numpy
from .estimator import Estimator, convergence_warning, floating, weights_of
from .implicit import ImplicitGram
from .kernels.families import Linear
from .kernels.named import resolve
from .lanczos import BlockLanczos
from .low_rank import nystrom, pivoted_cholesky

__all__ = ["KernelPCA", "KernelRidge"]

Numbers = NDArray[Any]

# A residual that has not halved in so many steps is down to the round-off of the products.
PATIENCE = 200
# Up to here, but no further than 20 rows a column of the block, components come from the stored matrix: there Krylov
# spaces, which end after some 6 products, take as long. 500 x 16, 2 components: 20 ms in place of 59.
DENSE_COMPONENTS = 512
# Up to here, on the CPU, Lanczos multiplies the stored matrix: 2000 x 64, 4 components, 337 ms in place of 945.
STORED_POINTS = 2048


class _KernelEstimator(Estimator):
    """Points that are finite, and results of their kind."""

    kernel: Any

    def _gram(self, X: Any) -> ImplicitGram:
        x = self._finite(X, reset=True)
        self.kernel_ = resolve(self.kernel, x)
        self.X_fit_ = ImplicitGram(self.kernel_, x).x
        return ImplicitGram(self.kernel_, self.X_fit_)

    def _finite(self, X: Any, *, reset: bool) -> Array:
        x = self._points(X, reset=reset)
        if not bool(x.isfinite().all() if is_torch(x) else np.isfinite(x).all()):
            raise ValueError("X: expected finite numbers, got NaN or inf")
        return x

    def _product(self, X: Any, weights: Array, center: Array | None = None) -> tuple[Numbers, Array]:
        """``k(X, X_fit) @ weights`` where and in the dtype in which X_fit is, of points less a centre; and X."""
        self._check_fitted()
        x = self._finite(X, reset=False)
        gram = ImplicitGram(self.kernel_, self.X_fit_)
        beside = is_torch(x) == is_torch(gram.x) and device_name(x) == device_name(gram.x)
        wide = cast(x if beside else of_kind(to_numpy(x), gram.x), gram.dtype.name)
        if center is not None:
            gram, wide = ImplicitGram(self.kernel_, gram.x - center), wide - center
        return gram.matmul(to_numpy(weights), wide), x


# ---- ridge regression ------------------------------------------------------------------------------------------------


class _WeightedGram:
    """``S K S``, S the diagonal matrix of `root` (n, 1)."""

    def __init__(self, gram: ImplicitGram, root: NDArray[np.float64]) -> None:
        self.gram, self.root = gram, root
        self.kernel, self.x, self.n, self.dtype = gram.kernel, gram.x, gram.n, gram.dtype

    def weighted(self, rows: Numbers) -> Numbers:
        """``S rows``."""
        return np.asarray(self.root * rows, rows.dtype)

    def matmul(self, v: Numbers) -> Numbers:
        return self.weighted(self.gram.matmul(self.weighted(v)))

    def dense(self) -> Numbers:
        matrix = self.gram.dense()
        matrix *= self.root.astype(self.dtype)
        matrix *= self.root.T.astype(self.dtype)
        return matrix


def _largest(residual: Numbers, targets: Numbers) -> float:
    """The largest norm of a column, as a part of its target's; where that is 0, the norm itself."""
    scale = np.linalg.norm(targets, axis=0)
    return float((np.linalg.norm(residual, axis=0) / np.where(scale > 0, scale, 1)).max(initial=0.0))


class KernelRidge(_KernelEstimator):
    r"""Kernel ridge regression.

    .. math:: f(x) = \sum_j \beta_j k(x, x_j), \quad (K + \alpha I) \beta = y

    With weights of the points f minimises :math:`\sum_i w_i (y_i - f(x_i))^2 + \alpha \|f\|^2`: with
    :math:`S = \mathrm{diag}(\sqrt{w})`, :math:`\beta = S \gamma` and
    :math:`(S K S + \alpha I) \gamma = S y`.

    Parameters
    ----------
    kernel : kernel or str
        Mercer: of `nearfar.kernels`, or a name of `nearfar.gram` with its default parameters. "rbf" has a length scale
        of ``sqrt(D / 2)``, for standardised points.
    alpha : float
        Positive: the ridge.
    solver : {"cg", "cholesky"}
        Conjugate gradients, O(N (D + rank)) memory; or factorisation of the stored matrix, N x N.
    tol : float
        "cg" stops when every residual ``|y - (K + alpha I) beta|`` is this part of ``|y|``. float32 products carry
        round-off of about ``1e-7 |K| |beta|``: where that is more, it stops there and warns.
    max_iter : int
        Steps of "cg" at most.
    preconditioner : {"nystrom", "pivoted_cholesky", None}
        How the low-rank factor is made.
    rank : int, optional
        Its columns; default ``4 sqrt(N)``.
    random_state : int
        For the Nystrom landmarks.
    verbose : bool
        A line with the residual, overwritten at every step of "cg", on the standard error.

    Attributes
    ----------
    dual_coef_ : array (N,) or (N, T)
        beta, of the kind of X.
    X_fit_ : array (N, D)
    residuals_ : list of float
        Of "cg": the largest relative residual after every step, by recursion; the last is computed anew. One for
        "cholesky". With weights of the system for gamma.
    n_iter_ : int
    n_features_in_ : int

    Notes
    -----
    scikit-learn's interface (`fit`, `predict`, `score`, `get_params`, pipelines, searches), which is not needed at run
    time. Its own KernelRidge stores N x N numbers. The preconditioner: Avron, Clarkson and Woodruff, Faster kernel
    ridge regression using sketching and preconditioning, 2017; Diaz, Epperly, Frangella, Tropp and Webber, 2023.

    Of points on a GPU the fused products run there; the vectors of "cg" and the preconditioner are on the host.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.linspace(0, 6, 500)[:, None]
    >>> model = nf.KernelRidge(nf.kernels.Gaussian(1.0), alpha=1e-3).fit(x, np.sin(x[:, 0]))
    >>> bool(abs(model.predict(np.array([[1.0]])) - np.sin(1)) < 1e-3)
    True
    """

    _estimator_type = "regressor"

    def __init__(
        self,
        kernel: Any = "rbf",
        alpha: float = 1.0,
        solver: str = "cg",
        *,
        tol: float = 1e-6,
        max_iter: int = 1000,
        preconditioner: str | None = "nystrom",
        rank: int | None = None,
        random_state: int = 0,
        verbose: bool = False,
    ) -> None:
        self.kernel = kernel
        self.alpha = alpha
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.preconditioner = preconditioner
        self.rank = rank
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import RegressorTags

        tags = super().__sklearn_tags__()
        tags.regressor_tags, tags.transformer_tags = RegressorTags(), None
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> KernelRidge:
        """Solve for `dual_coef_`.

        Parameters
        ----------
        X : array (N, D)
        y : array (N,) or (N, T)
            T targets are solved together.
        sample_weight : array (N,) or number, optional
            Of the squared errors; not negative. A point of weight 2 is that point twice, one of weight 0 is left out.
        """
        alpha, tol = (finite(getattr(self, name), name, 0.0, strict=True) for name in ("alpha", "tol"))
        if self.solver not in ("cg", "cholesky"):
            raise ValueError(f"solver: expected 'cg' or 'cholesky', got {self.solver!r}")
        plain = self._gram(X)
        targets, flat = self._targets(y, plain)
        weights = weights_of(sample_weight, plain.x)
        root = np.ones((plain.n, 1)) if weights is None else np.sqrt(weights.astype(np.float64))[:, None]
        gram = _WeightedGram(plain, root)
        if self.solver == "cg":
            beta = root * self._conjugate_gradients(gram, root * targets, alpha, tol)
        else:
            beta = root * self._factorise(gram, root * targets, alpha)
        beta = beta.astype(gram.dtype)
        self.dual_coef_ = of_kind(beta[:, 0] if flat else beta, gram.x)
        return self

    def predict(self, X: Any) -> Array:
        """``k(X, X_fit_) @ dual_coef_``: (M,) or (M, T), of the kind of X, whatever that of `fit` was."""
        self._check_fitted()
        product, x = self._product(X, self.dual_coef_)
        return of_kind(product, x)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination R^2, the mean over targets; 1 where a constant target is met."""
        predicted, wanted, weights = (
            np.asarray(to_numpy(values) if is_torch(values) else values, np.float64)
            for values in (self.predict(X), y, np.ones(len(X)) if sample_weight is None else sample_weight)
        )
        predicted, wanted = predicted.reshape(len(X), -1), wanted.reshape(len(X), -1)
        left = weights @ (wanted - predicted) ** 2
        whole = weights @ (wanted - np.average(wanted, 0, weights)) ** 2
        ratio = np.where(whole > 0, left / np.where(whole > 0, whole, 1), (left > 0).astype(float))
        return float(np.mean(1 - ratio))

    def _targets(self, y: Any, gram: ImplicitGram) -> tuple[NDArray[np.float64], bool]:
        """Targets (n, t), and whether they were one vector."""
        if y is None:
            raise ValueError("y: expected an array, got None; requires y to be passed, but the target y is None")
        targets = cast(to_numpy(floating(y, "y")), "float64")
        if targets.ndim not in (1, 2) or len(targets) != gram.n:
            raise ValueError(f"y: expected shape ({gram.n},) or ({gram.n}, t) to match X, got {targets.shape}")
        if not np.isfinite(targets).all():
            raise ValueError("y: expected finite numbers, got NaN or inf")
        return targets.reshape(gram.n, -1), targets.ndim == 1

    def _factorise(self, gram: _WeightedGram, targets: NDArray[np.float64], alpha: float) -> Numbers:
        matrix = gram.dense()
        matrix[np.diag_indices(gram.n)] += gram.dtype.type(alpha)
        try:
            from scipy.linalg import cho_factor, cho_solve
        except ImportError as error:
            raise ImportError("nearfar.KernelRidge: solver='cholesky' needs scipy: pip install scipy") from error
        try:
            beta: Numbers = cho_solve(cho_factor(matrix, lower=True, overwrite_a=True), targets.astype(gram.dtype))
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"alpha: K + {alpha} I is not positive definite in {gram.dtype}; ask nearfar.psd_report what it needs"
            ) from error
        self._note(gram, beta, targets, alpha, [])
        self.n_iter_ = 1
        return beta

    def _note(self, gram: _WeightedGram, beta: Numbers, targets: Numbers, alpha: float, history: list[float]) -> None:
        """Close the history with the residual itself."""
        residual = targets - gram.matmul(beta).astype(np.float64) - alpha * beta
        self.residuals_ = [*history, _largest(residual, targets)]

    def _preconditioner(self, gram: _WeightedGram, alpha: float) -> Any:
        """``(L L^T + alpha I)^-1`` by Woodbury's formula, in float64 but for products with L."""
        if self.preconditioner is None:
            return lambda r: r / alpha
        makers = {
            "nystrom": lambda rank: nystrom(
                gram.kernel, gram.x, rank, seed=check_seed(self.random_state, "random_state")
            ),
            "pivoted_cholesky": lambda rank: pivoted_cholesky(gram.kernel, gram.x, rank, 1e-7),
        }
        if self.preconditioner not in makers:
            raise ValueError(f"preconditioner: expected one of {', '.join(makers)}, None, got {self.preconditioner!r}")
        rank = math.ceil(4 * math.sqrt(gram.n)) if self.rank is None else integer(self.rank, "rank")
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        factor = gram.weighted(to_numpy(makers[self.preconditioner](min(rank, gram.n)).factor))
        # Eigenvectors of L^T L rather than its inverse: alpha may be below its round-off.
        values, vectors = np.linalg.eigh((factor.T @ factor).astype(np.float64))
        weights = 1 / (np.maximum(values, 0) + alpha)

        def apply(r: NDArray[np.float64]) -> NDArray[np.float64]:
            inner = vectors @ (weights[:, None] * (vectors.T @ (factor.T @ r.astype(gram.dtype)).astype(np.float64)))
            return np.asarray((r - factor @ inner.astype(gram.dtype)) / alpha)

        return apply

    def _conjugate_gradients(
        self, gram: _WeightedGram, targets: NDArray[np.float64], alpha: float, tol: float
    ) -> NDArray[np.float64]:
        """All targets at once, each with its own coefficients of the recursion."""
        most = integer(self.max_iter, "max_iter")
        apply = self._preconditioner(gram, alpha)
        beta, residual = np.zeros_like(targets), targets.copy()
        direction = conditioned = apply(residual)
        product = (residual * conditioned).sum(0)
        history = [_largest(residual, targets)]
        best = history[0], 0
        curved = True
        while history[-1] > tol and len(history) <= most and len(history) - best[1] <= PATIENCE:
            image = gram.matmul(direction).astype(np.float64) + alpha * direction
            curvature = (direction * image).sum(0)
            active = product > 0
            if (curvature[active] <= 0).any():  # K is not positive semi-definite, or rounds as if it were not
                curved = False
                break
            step = np.where(active, product / np.where(active, curvature, 1), 0)
            beta = beta + step * direction
            residual = residual - step * image
            conditioned = apply(residual)
            before, product = product, (residual * conditioned).sum(0)
            direction = conditioned + np.where(active, product / np.where(active, before, 1), 0) * direction
            history.append(_largest(residual, targets))
            best = (history[-1], len(history)) if history[-1] < best[0] / 2 else best
            if self.verbose:
                print(f"\rstep {len(history) - 1:4d}  residual {history[-1]:.3e}", end="", file=sys.stderr, flush=True)
        if self.verbose:
            print(file=sys.stderr)
        self.n_iter_ = len(history) - 1
        self._note(gram, beta, targets, alpha, history)
        if self.residuals_[-1] > 2 * tol:
            why = "" if curved else "; a direction of negative curvature: the kernel is not positive semi-definite at X"
            warnings.warn(
                f"KernelRidge: relative residual {self.residuals_[-1]:.3g} after {self.n_iter_} steps, wanted "
                f"{tol:.3g}{why}. More steps, a larger alpha or rank, or float64 points may help",
                convergence_warning(),
                stacklevel=3,
            )
        return beta


# ---- principal components --------------------------------------------------------------------------------------------


class KernelPCA(_KernelEstimator):
    r"""Principal components in the feature space of a kernel.

    .. math:: H K H u_c = \lambda_c u_c, \quad \text{component } c \text{ of } x_i = \sqrt{\lambda_c} \, u_{ic}

    Parameters
    ----------
    n_components : int
        At most N.
    kernel : kernel or str
        As for `KernelRidge`.
    tol : float
        Residual of every eigenpair relative to the largest eigenvalue; below round-off it is not reached.
    max_iter : int
        Fused products at most, each with ``n_components + 8`` columns.
    random_state : int
        For the start.

    Attributes
    ----------
    eigenvalues_ : array (n_components,)
        Descending. Those below round-off are 0, and so are their components.
    eigenvectors_ : array (N, n_components)
        Unit columns; the entry of largest modulus is positive.
    X_fit_ : array (N, D)
    n_iter_ : int
        Fused products.
    n_features_in_ : int

    Notes
    -----
    Block Lanczos with full re-orthogonalisation; up to 2048 points on the CPU the matrix is stored, and of a few
    hundred LAPACK takes it. Else memory is O(N n_components n_iter). With the linear kernel these are the principal
    components of X. Scholkopf, Smola and Muller, Nonlinear component analysis as a kernel eigenvalue problem, 1998. Of
    points on a GPU the products run there, and Lanczos on the host.

    Examples
    --------
    >>> import numpy as np, nearfar as nf
    >>> x = np.random.default_rng(0).standard_normal((50, 5)) * [9, 5, 1, 1, 1]
    >>> pca = nf.KernelPCA(2, "linear").fit(x)
    >>> bool(np.allclose(pca.eigenvalues_, np.linalg.svd(x - x.mean(0))[1][:2] ** 2))
    True
    """

    def __init__(
        self,
        n_components: int = 2,
        kernel: Any = "rbf",
        *,
        tol: float = 1e-6,
        max_iter: int = 30,
        random_state: int = 0,
    ) -> None:
        self.n_components = n_components
        self.kernel = kernel
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> KernelPCA:
        """Find the leading eigenpairs of the centred Gram matrix."""
        wanted = integer(self.n_components, "n_components")
        if wanted < 1:
            raise ValueError(f"n_components: expected at least 1, got {wanted}")
        gram = self._gram(X)
        if wanted > gram.n:
            raise ValueError(f"n_components: expected at most n_samples={gram.n}, got {wanted}")
        # Components of a linear kernel know no offset of the points, which would round the entries of K.
        self._center = common_center(gram.x) if type(self.kernel_) is Linear else None
        if self._center is not None:
            gram = ImplicitGram(self.kernel_, gram.x - self._center)
        if gram.n <= max(min(DENSE_COMPONENTS, 20 * (wanted + 8)), 8 * (wanted + 8)):
            values, vectors = self._dense(gram, wanted)
        else:
            values, vectors = self._lanczos(gram, wanted)
        rounding = 10 * float(np.finfo(gram.dtype).eps) * max(float(values.max(initial=0.0)), 0.0)
        kept = values > rounding
        values = np.where(kept, values, 0.0)
        vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
        # k(x, X) a - mean_j k(x_j, X) a, with a = u / sqrt(lambda) of sum 0: the other terms of centring vanish.
        self._weights = np.where(kept, vectors / np.sqrt(np.where(kept, values, 1)), 0.0)
        self._weights -= self._weights.mean(0)
        self._shift = gram.matmul(self._weights).astype(np.float64).mean(0)
        self.eigenvalues_ = of_kind(values.astype(gram.dtype), gram.x)
        self.eigenvectors_ = of_kind(vectors.astype(gram.dtype), gram.x)
        return self

    def transform(self, X: Any) -> Array:
        """Components (M, n_components) of points, of the kind of X, whatever that of `fit` was."""
        self._check_fitted()
        product, x = self._product(X, self._weights, self._center)
        return of_kind((product - self._shift).astype(product.dtype), x)

    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """`fit`, then the components of X: ``eigenvectors_ sqrt(eigenvalues_)``."""
        self.fit(X)
        return self.eigenvectors_ * self.eigenvalues_**0.5

    def _dense(self, gram: ImplicitGram, wanted: int) -> tuple[Numbers, Numbers]:
        matrix = gram.dense().astype(np.float64)
        matrix -= matrix.mean(0)
        matrix -= matrix.mean(1)[:, None]
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        self.n_iter_ = 1
        return values[::-1][:wanted], vectors[:, ::-1][:, :wanted]

    def _lanczos(self, gram: ImplicitGram, wanted: int) -> tuple[Numbers, Numbers]:
        most, tol = integer(self.max_iter, "max_iter"), finite(self.tol, "tol", 0.0)
        columns = wanted + 8
        passes = min(most, gram.n // columns - 1)
        random = np.random.default_rng(check_seed(self.random_state, "random_state"))
        start = random.standard_normal((gram.n, columns))
        lanczos = BlockLanczos(start - start.mean(0), passes)
        tol = max(tol, 4 * float(np.finfo(gram.dtype).eps))
        error = math.inf
        few = gram.n <= STORED_POINTS and device_name(gram.x) == "cpu"
        multiply = gram.stored() if few else gram.matmul
        while lanczos.done < passes and error > tol:
            product = multiply(lanczos.block - lanczos.block.mean(0)).astype(np.float64)
            lanczos.extend(product - product.mean(0))
            values, errors, coefficients = lanczos.ritz()
            error = float(errors[-wanted:].max() / max(abs(values[0]), abs(values[-1]), sys.float_info.min))
        self.n_iter_ = lanczos.done
        if error > tol:
            warnings.warn(
                f"KernelPCA: residual {error:.3g} after {passes} products, wanted {tol:.3g}; raise max_iter",
                convergence_warning(),
                stacklevel=3,
            )
        return values[::-1][:wanted], lanczos.vectors(coefficients[:, ::-1][:, :wanted])
