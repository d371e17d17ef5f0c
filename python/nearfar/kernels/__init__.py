"""Mercer kernels: dense Gram matrices, and products with them that never store the matrix."""

from __future__ import annotations

from .base import Kernel, Power, Product, Scaled, Sum
from .chi_squared import AdditiveChiSquared, ChiSquared
from .custom import Custom
from .families import (
    RBF,
    Cosine,
    Gaussian,
    Laplacian,
    Linear,
    Matern,
    Periodic,
    Polynomial,
    RationalQuadratic,
    Sigmoid,
    SquaredExponential,
)
from .mercer import MercerReport, check_mercer
from .named import gram
from .statistics import MMDTest, cka, hsic, mmd, mmd_permutation_test

__all__ = [
    "RBF",
    "AdditiveChiSquared",
    "ChiSquared",
    "Cosine",
    "Custom",
    "Gaussian",
    "Kernel",
    "Laplacian",
    "Linear",
    "MMDTest",
    "Matern",
    "MercerReport",
    "Periodic",
    "Polynomial",
    "Power",
    "Product",
    "RationalQuadratic",
    "Scaled",
    "Sigmoid",
    "SquaredExponential",
    "Sum",
    "check_mercer",
    "cka",
    "gram",
    "hsic",
    "mmd",
    "mmd_permutation_test",
]
