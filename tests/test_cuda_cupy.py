"""CuPy arrays go to the GPU's kernels, and results are CuPy arrays on it: the values of NumPy arrays on the CPU."""

import numpy as np
import pytest

import nearfar as nf

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

POINTS = [(130, 70, 40), (1, 3, 2), (5, 128, 129)]
CALLS = {
    "cdist": lambda x, y: nf.cdist(x, y),
    "cosine": lambda x, y: nf.cdist(x, y, metric="cosine"),
    "pdist": lambda x, y: nf.pdist(y),
    "cityblock": lambda x, y: nf.cdist(x, y, metric="cityblock"),
    "knn": lambda x, y: nf.knn(x, y, 2),
    "kmeans_assign": lambda x, y: nf.kmeans_assign(x, y),
    "gram": lambda x, y: nf.gram(x, y, kernel=nf.kernels.Gaussian(1.5)),
    "matmul": lambda x, y: nf.kernels.Matern(2.0, nu=1.5).matmul(x, y, y),
    "uniformity": lambda x, y: nf.uniformity(y),
    "info_nce": lambda x, y: nf.info_nce_loss(x, x[::-1] + 1, negative_keys=y, temperature=0.2),
    "info_nce gradients": lambda x, y: nf.value_and_grad(nf.info_nce_loss)(x, x[::-1] + 1),
    "siglip": lambda x, y: nf.siglip_loss(x, x[::-1] + 1, reduction="none"),
    "mmd": lambda x, y: nf.mmd(y, y * 2, kernel=nf.kernels.Gaussian(1.0)),
}


@pytest.fixture(autouse=True)
def needs_a_gpu():
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if count == 0:
        pytest.skip("needs a GPU")


def parts(result):
    """The arrays of a result, however deep."""
    if isinstance(result, dict):
        return [part for value in result.values() for part in parts(value)]
    if isinstance(result, (tuple, list)):
        return [part for value in result for part in parts(value)]
    return [result]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", POINTS)
@pytest.mark.parametrize("name", CALLS)
def test_values(name, shape, dtype):
    n, m, d = shape
    rng = np.random.default_rng(n)
    x, y = (rng.standard_normal((rows, d)).astype(dtype) for rows in (n, m))
    found = parts(CALLS[name](cupy.asarray(x), cupy.asarray(y)))
    expected = parts(CALLS[name](x, y))
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert isinstance(own, cupy.ndarray)
        assert own.dtype == np.asarray(other).dtype
        np.testing.assert_allclose(cupy.asnumpy(own), other, rtol=3e-5 if dtype == "float32" else 1e-9, atol=1e-6)


def test_current_stream():
    x = cupy.random.default_rng(0).standard_normal((300, 20))
    stream = cupy.cuda.Stream(non_blocking=True)
    expected = nf.cdist(x, x)
    cupy.cuda.Device().synchronize()
    with stream:
        own = nf.cdist(x, x)
        stream.synchronize()
    assert bool((own == expected).all())


def test_mixed_kinds_are_refused():
    x = np.zeros((3, 2), dtype=np.float32)
    with pytest.raises(TypeError, match="y"):
        nf.cdist(cupy.asarray(x), x)
