"""Gradients of 16-bit rows that are nearly equal, before they are rounded to 16 bits: `test_cuda.py` says where they run.

On Hopper weights are rounded to 16 bits. Those that are alike round alike, and gradients of such rows are differences:
what rounding takes from a row or column of weights meets the mean of the rows (csrc/cuda/rounding.hpp), or it would be
1e-2 to 2e-1 of these gradients.
"""

import generators as g
import pytest
import test_cuda
import torch
from test_cuda import DEVICE, tensor
from test_cuda_float16 import KEYS, check, error_of
from test_cuda_losses import BOTH, classes

import nearfar as nf
from nearfar import gradients

pytestmark = test_cuda.pytestmark
on_device, small_strips = test_cuda.on_device, test_cuda.small_strips

BOUNDS = {"bfloat16": 2.2e-3, "float16": 2.8e-4}  # of a gradient's norm; a weight is off by 1.1e-3, 1.4e-4
by_dtype = pytest.mark.parametrize("dtype", BOUNDS)


def cone(n, d, dtype, normalize=True, noise=0.7, seed=0):
    """Two views of rows whose cosines are 0.997, of norm one or (roughly, 16 bits being few) as they are."""
    x, y = g.pairs(n, d, noise=noise, seed=seed)
    return tuple(tensor(z / (1 if normalize else 20 * d**0.5), dtype) for z in (x + 20, y + 20))


CALLS = {
    "info_nce": (nf.info_nce_loss, KEYS, {"temperature": 0.5}),
    "info_nce without a common base": (nf.info_nce_loss, KEYS, {"temperature": 0.03}),
    "clip": (nf.clip_loss, BOTH, {"logit_scale": 2.0}),
    "siglip": (nf.siglip_loss, BOTH, {"logit_scale": 5.0, "logit_bias": -5.0}),
    "nt_xent": (nf.nt_xent_loss, ["z1", "z2"], {}),
    "dcl": (nf.dcl_loss, ["z1", "z2"], {}),
    "hcl": (nf.hcl_loss, ["z1", "z2"], {}),
}
calls = pytest.mark.parametrize(("loss", "names", "options"), CALLS.values(), ids=CALLS)


@by_dtype
@pytest.mark.parametrize("normalize", [True, False])
@calls
def test_losses(loss, names, options, normalize, dtype):
    rows = dict(zip(names, cone(150, 40, dtype, normalize), strict=True))
    check(loss, names, BOUNDS[dtype], **rows, **options, normalize=normalize)


@by_dtype
@calls
def test_blocks_of_weights(loss, names, options, dtype, small_strips):
    check(loss, names, BOUNDS[dtype], **dict(zip(names, cone(300, 40, dtype), strict=True)), **options)


@by_dtype
@pytest.mark.parametrize("n", [8, 24, 127])
def test_few_rows(n, dtype):
    check(nf.info_nce_loss, KEYS, BOUNDS[dtype], **dict(zip(KEYS, cone(n, 40, dtype), strict=True)), temperature=1.0)


# Lines of results that are, and are not, whole vectors; one step of the depth and several.
@by_dtype
@pytest.mark.parametrize("d", [17, 64, 130, 260])
def test_depths(d, dtype):
    check(nf.clip_loss, BOTH, BOUNDS[dtype], **dict(zip(BOTH, cone(140, d, dtype), strict=True)), logit_scale=2.0)


@by_dtype
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_sup_con(temperature, normalize, dtype):
    arguments = {"embeddings": cone(150, 40, dtype, normalize)[0], "labels": classes(150, 10)}
    check(nf.sup_con_loss, ["embeddings"], BOUNDS[dtype], **arguments, temperature=temperature, normalize=normalize)


@by_dtype
def test_uniformity(dtype):
    check(nf.uniformity, ["x"], BOUNDS[dtype], x=cone(150, 40, dtype)[0])


@by_dtype
@pytest.mark.parametrize(("n", "m"), [(40, 300), (300, 1), (130, 257)])
def test_sets_of_different_sizes(n, m, dtype):
    """One set in a cone is enough; the other is around the origin."""
    query, key = cone(n, 40, dtype)
    negatives = cone(m, 40, dtype, seed=1)[0]
    names = [*KEYS, "negative_keys"]
    for queries in (query, tensor(g.points(n, 40), dtype)):
        sets = dict(zip(names, (queries, key, negatives), strict=True))
        check(nf.info_nce_loss, names, BOUNDS[dtype], **sets, temperature=0.5, in_batch=True)


@by_dtype
@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.clip_loss])
def test_upstream_factors_of_rows(loss, dtype):
    """Rows that count differently: what columns lose is taken together, tile by tile, as if they counted alike."""
    rows = cone(300, 40, dtype)
    weights = torch.linspace(0.1, 3, 300, device=DEVICE)
    options = {"logit_scale": 2.0, "reduction": "none"}
    call = loss.__nearfar_plan__(*rows, **options)
    operation, _ = gradients._OPERATIONS[call.operation]
    _, *grads = operation(weights, *(part.value() for part in call.parts), *call.extra, *call.config, "01")
    names = [name for part in call.parts for name in part.names][:2]
    _, expected = g.reference(loss, names, weights, **dict(zip(names, rows, strict=True)), **options)
    for grad, exact in zip(grads, expected, strict=False):
        assert 0 < error_of(grad, exact) <= BOUNDS[dtype]
