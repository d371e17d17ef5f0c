"""The benchmark measures what it says: every case runs at its quick size and agrees with float64, whoever computes."""

import json
import os

import numpy as np
import pytest

import nearfar as nf
from nearfar import bench
from nearfar.bench import machine, measure, memory, report, sweep
from nearfar.bench.case import Case, label, normal
from nearfar.bench.cases import CASES, select

TIMED = [case for case in CASES if case.timed]


def build(function, problem):
    try:
        return function(problem)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")


@pytest.fixture
def toy():
    """A case of its own: row sums, with one good peer, one that is not installed and one that fails."""

    def missing(problem):
        raise ModuleNotFoundError("No module named 'nobody'", name="nobody")

    def failing(problem):
        raise RuntimeError("no compiler\nand more")

    def total(problem):
        return lambda: (problem["x"].sum(1),)

    return Case(
        name="toy",
        what="sums",
        shapes=({"n": 20, "d": 3},),
        quick={"n": 4, "d": 3},
        make=normal("x"),
        ours=total,
        peers={"numpy": total, "nobody": missing, "broken": failing},
        reference=lambda problem: (problem["x"].astype(np.float64).sum(1),),
        flops=lambda shape: shape["n"] * shape["d"],
        writes=lambda shape: 4 * shape["n"],
        sweep=(10, 20, 40),
    )


# ---- the cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TIMED, ids=lambda case: case.name)
def test_ours_agrees_with_float64(case):
    problem = case.problem(case.quick)
    result = build(case.ours, problem)()
    assert case.error(problem, result, case.reference(problem)) < case.tolerance


# Not KeOps: it runs a compiler at its first call, and writes into the home directory.
PEERS = [
    pytest.param(case, peer, id=f"{case.name}-{peer.replace(' ', '_')}")
    for case in TIMED
    for peer in case.peers
    if peer != "KeOps"
]


@pytest.mark.filterwarnings("default")  # those of other libraries are theirs
@pytest.mark.parametrize(("case", "peer"), PEERS)
def test_peers_compute_the_same(case, peer):
    problem = case.problem(case.quick)
    result = build(case.peers[peer], problem)()
    assert case.error(problem, result, case.reference(problem)) < case.peer_tolerance


def test_an_error_is_seen():
    case = select("cdist")[0]
    problem = case.problem(case.quick)
    (wanted,) = case.reference(problem)
    wrong = wanted.copy()
    wrong[0, 0] += 1e-2 * np.linalg.norm(wanted)
    assert case.error(problem, (wrong,), (wanted,)) == pytest.approx(1e-2)
    with pytest.raises(ValueError, match="shape"):
        case.error(problem, (wanted[1:],), (wanted,))


def test_losses_run_without_torch(monkeypatch):
    """Ours falls back on NumPy; values and gradients are the same ones."""

    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("nearfar.bench.case.load", missing)
    monkeypatch.setattr("nearfar.bench.cases.ranking.load", missing)
    for name in ("info_nce", "clip", "nt_xent", "uniformity", "batch_triplet_hard"):
        case = select(name)[0]
        problem = case.problem(case.quick)
        result = case.ours(problem)()
        assert all(isinstance(a, (np.ndarray, np.generic)) for a in result)
        assert case.error(problem, result, case.reference(problem)) < case.tolerance


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_selection():
    wanted = ["cdist", "cdist_backward", "cdist_cityblock", "cdist_batch", "knn"]
    assert [case.name for case in select("knn, cdist*")] == wanted
    with pytest.raises(ValueError, match=r"ops: expected some of info_nce,.*got 'nothing'"):
        select("knn,nothing")


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_calls_are_interleaved():
    calls = []
    mine, theirs = measure.paired(lambda: (calls.append("o"),), lambda: (calls.append("p"),), 0.0)
    assert "".join(calls) == "op" + "op" + "po" + "op"
    assert len(mine.samples) == len(theirs.samples) == measure.LEAST_PAIRS
    assert mine.least <= mine.median


def test_threads_are_put_back():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with measure.thread_limit(1):
        assert nf.get_num_threads() == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_rates():
    assert machine.fma_peak(1) > 0.1
    assert set(machine.write_rates(2)) == {"huge", "plain"}
    others = machine.Others().processors()
    assert others is None or others >= 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are exact on Linux only")
def test_memory_of_a_call():
    """The matrix of distances is the least that cdist needs."""
    case = select("cdist")[0]
    shape = {"n": 2048, "m": 2048, "d": 4}
    size = memory.extra_bytes(case, shape, memory.OURS, 1)
    assert 0.9 < size / (4 * 2048 * 2048) < 2
    with pytest.raises(RuntimeError, match="memory of nobody: exit status 1: KeyError"):
        memory.extra_bytes(case, shape, "nobody", 1)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_result_of_a_run(toy):
    result = bench.benchmark([toy], 1, 0.0, with_memory=False)
    assert set(result) == {"schema", "machine", "options", "rates", "results"}
    assert {"cpu", "date", "threads", "versions", "nearfar"} <= set(result["machine"])
    (line,) = result["results"]
    assert (line["case"], line["shape"], line["floor_flops"], line["written_bytes"]) == ("toy", toy.shapes[0], 60, 80)
    assert set(line["ours"]) == {"seconds", "error", "extra_bytes", "gflops", "of_peak", "of_write"}
    assert line["ours"]["of_peak"] == line["ours"]["gflops"] / result["rates"]["fma_gflops"]
    good, missing, broken = line["peers"]
    assert good["ratio"] == good["seconds"]["median"] / good["ours_seconds"]["median"]
    assert good["error"] < 1e-6
    assert (missing["status"], missing["ratio"]) == ("not installed", None)
    assert (broken["status"], broken["detail"]) == ("failed", "RuntimeError: no compiler\nand more")
    assert json.loads(json.dumps(result)) == result


def test_table_names_every_peer(toy):
    text = report.table(bench.benchmark([toy], 1, 0.0, with_memory=False))
    lines = text.splitlines()
    header = next(k for k, line in enumerate(lines) if line.startswith("operation"))
    first, second, third, note = lines[header + 1 :]
    assert first.startswith("toy")
    assert "20 x 3" in first
    assert first.endswith("x")
    assert second.strip() == "nobody: not installed"
    assert third.strip() == "broken: failed"
    assert note == "toy 20 x 3, broken: RuntimeError: no compiler"


def test_flags_are_of_keops_where_it_was_measured(toy, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O1")
    result = bench.benchmark([toy], 1, 0.0, with_memory=False)
    assert "KeOps" not in report.table(result)
    keops = {"KeOps": toy.peers["numpy"], **toy.peers}
    measured = bench.benchmark([Case(**{**vars(toy), "peers": keops})], 1, 0.0, with_memory=False)
    assert "KeOps compiled with -O1" in report.table(measured).splitlines()
    missing = bench.benchmark(
        [Case(**{**vars(toy), "peers": {"KeOps": toy.peers["nobody"]}})], 1, 0.0, with_memory=False
    )
    assert "compiled with" not in report.table(missing)
    bench.add_sweeps(result, [Case(**{**vars(toy), "peers": keops})], 1, 0.0)
    assert "KeOps compiled with -O1" in report.table(result).splitlines()


def test_only_ours(toy):
    """Nothing to compare with: still a line."""
    alone = Case(**{**vars(toy), "peers": {"nobody": toy.peers["nobody"]}})
    (line,) = bench.benchmark([alone], 1, 0.0, with_memory=False)["results"]
    assert line["ours"]["seconds"]["median"] > 0
    assert line["peers"][0]["status"] == "not installed"


# ---- time over n -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.sweep], ids=lambda case: case.name)
def test_sizes_of_sweeps(case):
    full, quick = sweep.shapes(case), sweep.shapes(case, quick=True)
    assert [shape["n"] for shape in full] == sorted(set(case.sweep))
    assert {**full[0], "n": 0} == {**case.shapes[0], "n": 0}
    assert quick == [{**case.quick, "n": case.quick["n"] // 2}, case.quick]
    floors = [case.flops(shape) for shape in full]
    assert floors == sorted(floors)


def test_sweep(toy):
    result = bench.benchmark([toy], 1, 0.0, with_memory=False)
    bench.add_sweeps(result, [toy, select("cdist")[0]], 1, 0.0)
    (swept,) = result["sweeps"]  # a case without sizes has none
    assert (swept["case"], swept["what"]) == ("toy", "sums")
    assert [(p["shape"], p["floor_flops"]) for p in swept["points"]] == [({"n": n, "d": 3}, 3 * n) for n in toy.sweep]
    for point in swept["points"]:
        lines = point["lines"]
        assert {name: line["status"] for name, line in lines.items()} == {
            "nearfar": "ok",
            "numpy": "ok",
            "nobody": "not installed",
            "broken": "failed",
        }
        assert all(len(lines[name]["seconds"]["samples"]) >= measure.LEAST_PAIRS for name in ("nearfar", "numpy"))
        assert lines["nobody"]["seconds"] is lines["broken"]["seconds"] is None
        assert lines["broken"]["detail"] == "RuntimeError: no compiler\nand more"
    assert json.loads(json.dumps(result)) == result
    lines = report.table(result).splitlines()
    start = lines.index("toy over n, d = 3, ms")
    assert lines[start + 1].split() == ["n", "floor", "nearfar", "numpy", "nobody", "broken"]
    assert [line.split()[0] for line in lines[start + 2 :]] == ["10", "20", "40"]


def test_sweep_needs_ours(toy):
    reversed_roles = Case(**{**vars(toy), "ours": toy.peers["broken"], "peers": {}})
    with pytest.raises(RuntimeError, match="no compiler"):
        sweep.run(reversed_roles, sweep.shapes(reversed_roles), 1, 0.0)


@pytest.mark.parametrize(
    ("limit", "value", "detail"), [("MOST_SECONDS", 0.0, "would take 0 s"), ("MOST_BYTES", -1, "would take 0 GiB")]
)
def test_sweep_leaves_out_who_takes_too_much(toy, monkeypatch, limit, value, detail):
    """Foretold from the size before, so never at the first; ours goes on."""
    monkeypatch.setattr(sweep, limit, value)
    first, *others = sweep.run(toy, sweep.shapes(toy), 1, 0.0)["points"]
    assert first["lines"]["numpy"]["status"] == "ok"
    for point in others:
        assert point["lines"]["numpy"] == {"status": "left out", "detail": detail, "seconds": None, "extra_bytes": None}
        assert point["lines"]["nearfar"]["seconds"]["min"] > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are exact on Linux only")
def test_sweep_measures_memory(toy, monkeypatch):
    """A matrix of all pairs is seen, and the next one, 16 times as large, foretold."""

    def square(problem):
        return lambda: (np.ones((problem.shape["n"],) * 2, np.float32).sum(1),)

    dense = {**vars(toy), "peers": {"dense": square}, "sweep": (4096, 16384), "flops": lambda shape: shape["n"] ** 2}
    monkeypatch.setattr(sweep, "MOST_BYTES", 900 << 20)
    small, large = sweep.run(Case(**dense), sweep.shapes(Case(**dense)), 1, 0.0)["points"]
    assert 60 << 20 < small["lines"]["dense"]["extra_bytes"] < 100 << 20
    assert large["lines"]["dense"]["status"] == "left out"
    assert large["lines"]["dense"]["detail"] == "would take 1 GiB"


def test_picture(toy, tmp_path, monkeypatch):
    """Bars and panels: every peer that was timed, the floor, and where somebody was left out."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: kept.append(figure))
    result = bench.benchmark([toy], 1, 0.0, with_memory=False)
    report.plot(result, tmp_path / "bars.png")
    monkeypatch.setattr(sweep, "MOST_SECONDS", 0.0)
    bench.add_sweeps(result, [toy], 1, 0.0)
    report.plot(result, tmp_path / "both.png")
    (alone,), (bars, panel) = (figure.axes for figure in kept)
    for axes in (alone, bars):
        assert [text.get_text() for text in axes.get_yticklabels()] == ["toy  20 x 3  vs numpy"]
    ours, numpy, floor = panel.get_lines()
    assert ours.get_label() == "nearfar"
    assert list(ours.get_xdata()) == list(floor.get_xdata()) == list(toy.sweep)
    assert numpy.get_label() == "numpy; n = 20 would take 0 s"
    assert list(numpy.get_xdata()) == [10]
    assert floor.get_ydata() == pytest.approx([3e-6 * n / result["rates"]["fma_gflops"] for n in toy.sweep])


def test_command(tmp_path, capsys):
    target, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--quick", "--ops", "kmeans_assign", "--threads", "1", "--budget", "0", "--json", str(target)]
    try:
        import matplotlib  # noqa: F401

        arguments += ["--plot", str(picture)]
    except ModuleNotFoundError:
        pass
    assert bench.main(arguments) == 0
    output = capsys.readouterr().out
    assert "kmeans_assign" in output
    assert "sizes too small" in output
    result = json.loads(target.read_text())
    assert result["schema"] == bench.SCHEMA
    assert [label(line["shape"]) for line in result["results"]] == ["1000 x 64 x 64"]
    if "--plot" in arguments:
        assert [swept["case"] for swept in result["sweeps"]] == ["kmeans_assign"]
        assert "kmeans_assign over n, k = 64, d = 64, ms" in output
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "nothing"], "ops: expected some of"),
        (["--threads", "0"], "threads: expected a positive number, got 0"),
        (["--device", "cuda", "--threads", "2"], "--threads: only on the CPU"),
        (["--device", "cuda", "--no-memory"], "--no-memory: only on the CPU"),
        (["--device", "cuda"], "--device cuda needs a GPU and a build with CUDA"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err
