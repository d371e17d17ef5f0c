"""Scores of 16-bit rows whose products run during epilogues (`NEARFAR_CUDA_OVERLAP=1`), against those that wait for
them: every number has the same bits. Where this runs: test_cuda.py.
"""

import os
import subprocess
import sys

import generators as g
import pytest
import references
import test_cuda
from test_cuda import DEVICE, EMULATED, tensor
from test_cuda_float16 import wide_gradients

import nearfar as nf

pytestmark = test_cuda.pytestmark
on_device, small_strips = test_cuda.on_device, test_cuda.small_strips

# Around tiles of 128; an emulated device has four multiprocessors: blocks with a tile, with several, with a change of
# rows. Depths around steps of 64, up to the four that there is room for, each with one of the types.
SHAPES = [(1, 1), (127, 129), (129, 1), (257, 127), (1000, 129), (129, 1000)]
by_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A device that has the kernels."""
    if EMULATED:
        monkeypatch.setenv("NEARFAR_EMULATE_ARCHITECTURE", "90")
    elif not test_cuda.on_hopper():
        pytest.skip("needs a Hopper GPU, or an emulated one")


@pytest.fixture
def check(monkeypatch):
    """The loss and its float32 gradients, either way."""

    def results(path, loss, arguments):
        monkeypatch.setenv("NEARFAR_CUDA_OVERLAP", path)
        return [loss(**arguments), *(grad for names, grad in wide_gradients(loss, arguments) if names)]

    def check(loss, *rows, **options):
        arguments = dict(zip(g.inspect.signature(loss).parameters, rows, strict=False)) | options
        for own, other in zip(*(results(path, loss, arguments) for path in "01"), strict=True):
            assert own.isfinite().all()
            assert references.same_bits(own.cpu(), other.cpu())

    return check


@pytest.mark.parametrize(("d", "dtype"), [(16, "bfloat16"), (64, "float16"), (72, "bfloat16"), (256, "float16")])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_rows_and_columns(n, m, d, dtype, check):
    sets = [tensor(g.points(count, d, seed=seed), dtype) for seed, count in enumerate((n, n, m))]
    check(nf.info_nce_loss, *sets, in_batch=False)


def test_many_tiles(check):
    check(nf.clip_loss, *test_cuda.pair(1000, 72, "bfloat16"))


@by_dtype
@pytest.mark.parametrize("scale", [10, 50])
@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.clip_loss, nf.nt_xent_loss, nf.dcl_loss])
def test_losses(loss, scale, dtype, check):
    """Scores with and without a common bound."""
    check(loss, *test_cuda.pair(300, 130, dtype), logit_scale=scale)


@by_dtype
@pytest.mark.parametrize("loss", [nf.info_nce_loss, nf.clip_loss])
def test_blocks_of_weights(loss, dtype, check, small_strips):
    check(loss, *test_cuda.pair(300, 40, dtype))


@by_dtype
def test_nearest(dtype, monkeypatch):
    x, y = (tensor(g.points(n, 72, seed=n), dtype) for n in (300, 260))
    found = []
    for path in "01":
        monkeypatch.setenv("NEARFAR_CUDA_OVERLAP", path)
        found.append(nf.kmeans_assign(x, y))
    for own, other in zip(*found, strict=True):
        assert references.same_bits(own.cpu(), other.cpu())


@pytest.mark.parametrize(("d", "taken"), [(256, True), (257, False)])
def test_who_takes_it(d, taken):
    code = f"""if True:
        import torch, nearfar as nf
        nf.backend.emulate = {EMULATED}
        nf.info_nce_loss(*torch.ones(2, 8, {d}, dtype=torch.bfloat16, device="{DEVICE}"))"""
    env = os.environ | {"NEARFAR_CUDA_OVERLAP": "1", "NEARFAR_CUDA_PLAN": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert ("during epilogues" in run.stderr) == taken
