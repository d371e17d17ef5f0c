"""Every instruction set that this build has: the same answers, chosen by NEARFAR_ISA.

Levels are chosen once per process, so each runs in one of its own. `pytest -m isa` under each level checks the numerics
themselves (.ci/run); here the levels are compared with one another.
"""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

# Integer-valued points: sums of products are exact in any order, fused or not, so the bits must agree. Losses on random
# points: sums are ordered by the width of a vector, so they agree to the rounding of float32.
WORK = r"""
import hashlib, json, sys
import numpy as np
import nearfar as nf

rng = np.random.default_rng(0)
exact, close = {}, {}

def bits(name, *arrays):
    exact[name] = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()

for d in (1, 3, 16, 17, 64, 130):
    for dtype in ("float16", "float32", "float64"):
        x, y = (rng.integers(-3, 4, (n, d)).astype(dtype) for n in (143, 517))
        for metric in ("sqeuclidean", "dot", "euclidean"):
            bits(f"cdist {metric} {d} {dtype}", nf.cdist(x, y, metric), nf.cdist(x, None, metric))
            bits(f"pdist {metric} {d} {dtype}", nf.pdist(x, metric))
            bits(f"knn {metric} {d} {dtype}", *nf.knn(x, y, 7, metric=metric), *nf.knn(y, k=3, metric=metric))
        bits(f"assign {d} {dtype}", *nf.kmeans_assign(y, x))
for d in (3, 40, 257):
    for dtype in ("float32", "float64"):
        x, y = (rng.standard_normal((150, d)).astype(dtype) for _ in range(2))
        for f in (nf.info_nce_loss, nf.clip_loss, nf.nt_xent_loss, nf.alignment):
            value, grads = nf.value_and_grad(f, (0, 1))(x, x + y)
            close[f"{f.__name__} {d} {dtype}"] = float(value)
            close[f"{f.__name__} {d} {dtype} gradients"] = [float(np.linalg.norm(g)) for g in grads]
        close[f"uniformity {d} {dtype}"] = float(nf.uniformity(x))
        close[f"gram {d} {dtype}"] = float(nf.gram(x, y, lengthscale=d**0.5).sum(dtype=np.float64))
        v = np.ones((150, 2), dtype)
        close[f"matmul {d} {dtype}"] = float(nf.kernels.Gaussian(d**0.5).matmul(x, y, v).sum(dtype=np.float64))
json.dump({"isa": nf.build_info()["isa"], "exact": exact, "close": close}, sys.stdout)
"""


def run(code, isa=None):
    """Python with NEARFAR_ISA set to `isa`, or not set."""
    environment = {name: value for name, value in os.environ.items() if name != "NEARFAR_ISA"}
    if isa is not None:
        environment["NEARFAR_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


USE = "import nearfar as nf; print(nf.build_info()['isa'])"


@functools.cache
def levels():
    """The levels of this build that this CPU has, as an unknown one's refusal lists them, best first."""
    refusal = run(USE, "none").stderr.strip().splitlines()[-1]
    known = refusal.partition("expected one of ")[2].split(", ")
    return [level for level in known if run(USE, level).returncode == 0]


@functools.cache
def results(level):
    done = run(WORK, level)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_choice():
    assert levels()
    for level in levels():
        assert run(USE, level).stdout.strip() == level
    best = run(USE).stdout.strip()
    assert best == levels()[0]
    assert run(USE, "").stdout.strip() == best


@pytest.mark.parametrize("name", ["none", "V4", "v4 ", "v", "avx2", "0"])
def test_unknown_level(name):
    """The import succeeds; the first use says what is wrong."""
    done = run("import nearfar as nf, numpy as np; print('imported'); nf.cdist(np.ones((2, 2)))", name)
    assert done.stdout == "imported\n"
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"RuntimeError: NEARFAR_ISA={name}: expected one of {', '.join(known_levels())}"
    )


def known_levels():
    """With those that this CPU lacks."""
    return run(USE, "none").stderr.strip().rpartition("expected one of ")[2].split(", ")


def test_level_that_the_cpu_lacks():
    missing = [level for level in known_levels() if level not in levels()]
    if not missing:
        pytest.skip("this CPU has every level of the build")
    for level in missing:
        assert run(USE, level).stderr.strip().endswith(f"NEARFAR_ISA={level}: this CPU does not have it")


def test_levels_agree():
    if len(levels()) == 1:
        pytest.skip("one level only")
    first, *others = (results(level) for level in levels())
    for other in others:
        assert [name for name, digest in first["exact"].items() if other["exact"][name] != digest] == []
        for name, value in first["close"].items():
            tolerance = 1e-12 if "float64" in name else 1e-5 if "gradients" in name else 1e-6
            np.testing.assert_allclose(other["close"][name], value, rtol=tolerance, err_msg=f"{name}, {other['isa']}")
