"""csrc/cpu/vector.hpp through its test door: error in ulp against a wider type, edges of the range, tails.

Runs at the instruction set the module chose; set NEARFAR_ISA to test another.
"""

import numpy as np
import pytest

from nearfar import _core

pytestmark = pytest.mark.isa

# Largest error allowed, in units in the last place of the result: the contract in the header of vector.hpp.
MAX_ULP = {"exp": 2, "log": 2, "expm1": 3, "log1p": 3, "exp_flush": 2, "softplus": 3, "sigmoid": 3}
REFERENCE = {"exp": np.exp, "log": np.log, "expm1": np.expm1, "log1p": np.log1p, "exp_flush": np.exp}
REFERENCE["softplus"] = lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
REFERENCE["sigmoid"] = lambda x: np.where(x < 0, np.exp(x), 1) / (1 + np.exp(-np.abs(x)))
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
# exp_flush is 0 below 2^FLUSH, and so are softplus and sigmoid, which take it for their exponential.
FLUSH = {np.float32: -125, np.float64: -1021}

functions = pytest.mark.parametrize("name", MAX_ULP)
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        pytest.param(
            np.float64,
            marks=pytest.mark.skipif(
                np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant, reason="no type wider than float64 here"
            ),
        ),
    ],
)


def apply(name, x):
    out = np.full_like(x, 12345)
    _core.vector_math(name, x, out)
    return out


def reference(name, x):
    """The function in the next wider type."""
    with np.errstate(all="ignore"):
        exact = REFERENCE[name](x.astype(WIDER[x.dtype.type]))
        if name in ("exp_flush", "softplus", "sigmoid"):
            exact = np.where(exact < np.ldexp(exact.dtype.type(1), FLUSH[x.dtype.type]), 0, exact)
    return exact


def ulp_error(result, exact):
    """|result - exact| in units in the last place of the result's type; inf where only one of the two is NaN.

    Overflow counts as the power of two that it would have been rounded to.
    """
    info = np.finfo(result.dtype)
    overflow = np.ldexp(exact.dtype.type(1), info.maxexp)
    with np.errstate(all="ignore"):
        result, exact = (np.clip(a.astype(exact.dtype), -overflow, overflow) for a in (result, exact))
        exponent = np.clip(np.frexp(np.nan_to_num(exact))[1] - 1, info.minexp, info.maxexp - 1)
        error = np.ldexp(np.abs(result - exact), info.nmant - exponent).astype(np.float64)
    error[np.isnan(result) != np.isnan(exact)] = np.inf
    return np.nan_to_num(error, nan=0, posinf=np.inf)


def arguments(name, dtype, rng, n=400_000):
    """Random bits, where exp is finite, around the zero of the function, tiny ones, denormals."""
    unsigned = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    info = np.finfo(dtype)
    bits = rng.integers(0, np.iinfo(unsigned).max, n, dtype=unsigned, endpoint=True).view(dtype)
    largest = float(np.log(info.max))
    in_range = rng.uniform(-1.2 * largest, 1.02 * largest, n)
    near = rng.uniform(-0.75, 2, n) + (name == "log")
    tiny = rng.uniform(-1, 1, n) * 10.0 ** rng.uniform(-info.precision - 6, 0, n)
    denormal = rng.uniform(-8, 8, n).astype(dtype) * info.smallest_normal
    return np.concatenate([part.astype(dtype) for part in (bits, in_range, near, tiny, denormal)])


@functions
@dtypes
def test_ulp(name, dtype):
    x = arguments(name, dtype, np.random.default_rng(0))
    error = ulp_error(apply(name, x), reference(name, x))
    worst = np.argmax(error)
    assert error[worst] <= MAX_ULP[name], f"{name}({x[worst]!r}) is {error[worst]:.3f} ulp off"


@dtypes
def test_ulp_where_exp_underflows(dtype):
    info = np.finfo(dtype)
    low, high = float(np.log(info.smallest_subnormal)) - 1, float(np.log(info.smallest_normal)) + 1
    x = np.linspace(low, high, 200_001, dtype=dtype)
    result = apply("exp", x)
    assert ulp_error(result, reference("exp", x)).max() <= MAX_ULP["exp"]
    assert ((result > 0) & (result < info.smallest_normal)).any(), "underflow is gradual"
    flushed = apply("exp_flush", x)
    assert ((flushed == 0) | (flushed >= info.smallest_normal)).all()
    # Where it is not 0 it is exp; the two may round differently, so each is held to the reference.
    assert ulp_error(flushed, reference("exp_flush", x)).max() <= MAX_ULP["exp_flush"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("exp", [0.0, -0.0, -np.inf, np.inf, -1e30, 1e30, -800, 800], [1, 1, 0, np.inf, 0, np.inf, 0, np.inf]),
        ("exp_flush", [0.0, -0.0, -np.inf, np.inf, -1e30, 1e30, -800, 800], [1, 1, 0, np.inf, 0, np.inf, 0, np.inf]),
        ("log", [1.0, 0.0, -0.0, np.inf], [0.0, -np.inf, -np.inf, np.inf]),
        ("log", [-1e-30, -1, -np.inf], [np.nan] * 3),
        ("expm1", [0.0, -0.0, -np.inf, np.inf, -1e30, 1e30, 1e-30], [0.0, -0.0, -1, np.inf, -1, np.inf, 1e-30]),
        ("log1p", [0.0, -0.0, -1.0, np.inf, 1e-30, -1e-30], [0.0, -0.0, -np.inf, np.inf, 1e-30, -1e-30]),
        ("log1p", [-1.0000002, -2, -1e30, -np.inf], [np.nan] * 4),
        ("softplus", [-np.inf, np.inf, -1e30, 1e30, -800, 800], [0, np.inf, 0, 1e30, 0, 800]),
        ("sigmoid", [0.0, -0.0, -np.inf, np.inf, -1e30, 1e30, -800, 800], [0.5, 0.5, 0, 1, 0, 1, 0, 1]),
    ],
)
def test_special_values(name, x, expected, dtype):
    result = apply(name, np.array(x, dtype))
    expected = np.array(expected, dtype)
    np.testing.assert_array_equal(result, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(result[number]), np.signbit(expected[number]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@functions
def test_nan_stays_in_its_lane(name, dtype):
    clean = np.linspace(0.1, 3, 67, dtype=dtype)
    expected = apply(name, clean)
    quiet = {np.float32: 0x7FC00000, np.float64: 0x7FF8000000000000}[dtype]
    unsigned = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    sign = unsigned(1) << unsigned(np.dtype(dtype).itemsize * 8 - 1)
    # Payloads and signs must not matter: an exponent field assembled from a NaN's bits could make a number of it.
    for payload in (0, 1, 0x1FF, 0x2AAAAA):
        for bits in (unsigned(quiet | payload), unsigned(quiet | payload) | sign):
            x = clean.copy()
            x.view(unsigned)[5::7] = bits
            result = apply(name, x)
            is_nan = np.zeros(67, bool)
            is_nan[5::7] = True
            np.testing.assert_array_equal(np.isnan(result), is_nan)
            np.testing.assert_array_equal(result[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@functions
@pytest.mark.parametrize("n", [0, 1, 7, 16, 17, 33])
def test_tails(name, n, dtype):
    """A tail gives the same bits as the middle of an array and nothing is written past the end."""
    x = np.linspace(0.1, 3, 80, dtype=dtype)
    whole = apply(name, x)
    buffer = np.full(n + 8, -7, dtype)
    _core.vector_math(name, x[:n], buffer[:n])
    np.testing.assert_array_equal(buffer[:n], whole[:n])
    np.testing.assert_array_equal(buffer[n:], np.full(8, -7, dtype))
