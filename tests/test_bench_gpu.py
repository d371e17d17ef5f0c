"""The GPU benchmark, on the CPU: ours and every peer of a line compute the same quantity, and a run says what it had."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nearfar import backend, bench
from nearfar.bench import gpu
from nearfar.bench import gpu_peers as peers
from nearfar.bench.case import load

torch = pytest.importorskip("torch")

LINES = gpu.lines(quick=True)
LOSSES = [replace(line, dtype="float32") for line in LINES if not line.search]
SEARCHES = [line for line in LINES if line.search]
EXACT = {"float32": 1e-5, "bfloat16": 2e-2}  # eager torch rounds every score to bfloat16


def identity(line):
    return f"{line.name}-{line.dtype}-{'x'.join(map(str, line.size))}"


def squared_distances(line, compute):
    """Exact ones, summed, of what a search found: a tie that is decided otherwise is no error."""
    x, y = gpu.make(line, "cpu")
    found, (x, y) = compute(x, y), (x.double(), y.double())
    if line.name == "kmeans":  # centroids: to the nearest
        return torch.cdist(x, found.double()).amin(1).square().sum()
    return (x[:, None, :] - y[found.long().reshape(len(x), -1)]).square().sum()


def assert_agrees(line, compute):
    if line.search:
        wanted = squared_distances(replace(line, dtype="float32"), line.dense)
        torch.testing.assert_close(squared_distances(line, compute), wanted, rtol=EXACT[line.dtype], atol=0)
    else:
        assert gpu.Accuracy(line, "cpu").error(compute) < 1e-4


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LOSSES + SEARCHES, ids=identity)
def test_ours_and_torch_agree(line):
    for compute in (line.ours, line.dense, line.chunked):
        if compute is not None:
            assert_agrees(line, compute)


def test_lines():
    """Names and sizes at both settings are those of one list; only known libraries are named."""
    for full, quick in zip(gpu.lines(quick=False), LINES, strict=True):
        assert (full.name, full.dtype, full.units) == (quick.name, quick.dtype, quick.units)
        assert set(full.libraries) <= set(peers.LIBRARIES)
    named = {library for line in LINES for library in line.libraries}
    assert named == set(peers.LIBRARIES)


@pytest.mark.parametrize(
    "line", [line for line in LINES if "KeOps" in line.libraries and line.name != "matern_matmul"], ids=identity
)
def test_keops_agrees(line, tmp_path_factory):
    """One formula of each kind: each takes a compiler's time."""
    pykeops = pytest.importorskip("pykeops")
    pykeops.set_verbose(False)
    pykeops.set_build_folder(str(tmp_path_factory.getbasetemp() / "keops"))
    assert_agrees(line, line.libraries["KeOps"])


def flash_loss(q, k, labels=None, scale=None, head_dim=256):
    """Inf-CL's contract: unit rows of float32 in heads, a loss for each row."""
    assert q.dtype == k.dtype == torch.float32
    assert q.shape[1] % head_dim == 0
    torch.testing.assert_close(q.norm(dim=1), torch.ones(len(q)))
    return torch.nn.functional.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


def flash_assign(x, centroids, x_sq):
    assert x_sq.dtype == torch.float32
    torch.testing.assert_close(x_sq, x.float().square().sum(-1))
    return torch.cdist(x.float(), centroids.float()).argmin(-1).int()


def flash_kmeans(x, n_clusters, max_iters, tol, init_centroids):
    assert (max_iters, tol, init_centroids.shape[1]) == (peers.ITERATIONS, 0, n_clusters)
    centroids = peers.lloyd(x[0], init_centroids[0])
    return peers.assign(x[0], centroids)[None], centroids[None], max_iters


def brute_force_search(index, queries, k, resources):
    return torch.cdist(queries, index).topk(k, largest=False)


# What needs a GPU, as its documentation and sources describe it: this checks how it is called, not what it computes.
CONTRACTS = {
    "inf_cl": SimpleNamespace(cal_flash_loss=flash_loss),
    "flash_kmeans.assign_euclid_triton": SimpleNamespace(euclid_assign_triton=flash_assign),
    "flash_kmeans.kmeans_triton_impl": SimpleNamespace(batch_kmeans_Euclid=flash_kmeans),
    "cuvs.common": SimpleNamespace(Resources=lambda: SimpleNamespace(sync=lambda: None)),
    "cuvs.neighbors.brute_force": SimpleNamespace(
        build=lambda dataset, metric, resources: dataset, search=brute_force_search
    ),
}


@pytest.mark.parametrize(
    ("line", "library"),
    [
        pytest.param(line, library, id=f"{identity(line)}-{library}")
        for line in LOSSES + SEARCHES
        for library in line.libraries
        if library != "KeOps"
    ],
)
def test_libraries_are_called_as_they_ask(line, library, monkeypatch):
    monkeypatch.setattr(peers, "load", lambda name: CONTRACTS.get(name) or load(name))
    peers._cuvs_resources.cache_clear()
    assert_agrees(line, line.libraries[library])
    peers._cuvs_resources.cache_clear()


# ---- a run -----------------------------------------------------------------------------------------------------------


def product(x, y):
    return (x @ y.T).sum()


def broken(x, y):
    raise OSError("no such library\nand more")


@pytest.fixture
def toy(monkeypatch):
    """A run of one line in torch alone, so on the CPU in any build, with one good library, one missing, one broken."""
    line = gpu.Line(
        "toy", "float32", (8, 12, 4), 1, product, product,
        libraries={"Inf-CL": product, "KeOps": broken, "cuVS": product}, gradients=1,
    )  # fmt: skip
    monkeypatch.setattr(gpu, "lines", lambda quick: [line])
    monkeypatch.setattr(backend, "emulate", True)
    monkeypatch.setattr(peers, "installed", lambda library: library in ("Inf-CL", "KeOps"))
    return line


def test_run_with_some_libraries(toy, tmp_path, capsys):
    target = tmp_path / "out.json"
    assert bench.main(["--device", "cuda", "--quick", "--budget", "0", "--json", str(target)]) == 0
    head, ours, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("; not installed: cuVS, flash-kmeans")
    assert ours.startswith("toy")
    eager, good, failed = (row.strip() for row in rows)
    assert eager.startswith("eager: ")
    assert good.startswith("Inf-CL: ")
    assert "x our time, error " in good
    assert failed == "KeOps: OSError: no such library"
    (result,) = json.loads(target.read_text())["results"]
    assert result["error"] < 1e-6
    assert result["peers"]["Inf-CL"]["seconds"] > 0
    assert result["peers"]["KeOps"] == {
        "seconds": None, "extra_bytes": None, "error": None, "failed": "OSError: no such library",
    }  # fmt: skip


def test_head_line_without_gaps(toy, monkeypatch, capsys):
    monkeypatch.setattr(peers, "installed", lambda library: True)
    assert bench.main(["--device", "cuda", "--quick", "--budget", "0", "--ops", "toy"]) == 0
    assert "not installed" not in capsys.readouterr().out


def test_installed(monkeypatch):
    monkeypatch.setitem(peers.LIBRARIES, "KeOps", "no_such_module")
    monkeypatch.setitem(peers.LIBRARIES, "cuVS", "torch")
    assert not peers.installed("KeOps")
    assert peers.installed("cuVS")


def test_sets_of_a_line():
    """Other views of the same rows, then what a queue adds; gradients of the first sets only."""
    line = next(line for line in LINES if line.name == "info_nce_queue")
    x, y = gpu.make(replace(line, dtype="float32"), "cpu")
    n = len(x)
    assert (x.requires_grad, y.requires_grad) == (True, False)
    similarity = torch.nn.functional.cosine_similarity(x, y[:n]).mean()
    assert similarity > 0.5
    assert abs(torch.nn.functional.cosine_similarity(x[: len(y) - n], y[n:]).mean()) < 0.3
    assert len(gpu.step_of(line.ours, line, [x, y])()) == 2  # value and one gradient
