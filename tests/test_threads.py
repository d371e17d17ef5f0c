"""The thread pool: the same bits for any number of threads, fork, callers side by side, Ctrl-C, no GIL held, and torch's
threads in its place."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import nearfar as nf
from nearfar import _core

TIMEOUT = 60  # seconds after which a child counts as hung

rng = np.random.default_rng(0)
X, Y = rng.standard_normal((2, 1003, 37)).astype(np.float32)
V = rng.standard_normal((1003, 5)).astype(np.float32)
LONG = rng.standard_normal((5003, 9)).astype(np.float32)  # K(x, x) v is computed by half


def select(x, y, threads, k=3):
    value = np.empty((1, len(x), k), np.float32)
    index = np.full((1, len(x), k), -1)
    _core.select(x[None], y[None], "sqeuclidean", 2.0, False, False, k, value, index, "automatic", threads)
    return value, index


def matmul_grad(threads, same=False):
    dx, dy = np.zeros_like(X[None]), None if same else np.zeros_like(Y[None])
    program, parameters, dp = "sqeuclidean 0 -1; dot 0 20; gaussian 0 0; add 1 2", np.array([0.5]), np.zeros(1)
    points = X[None], (X if same else Y)[None]
    _core.matmul_grad(*points, V[None], V[None], program, parameters, same, dx, dy, dp, threads)
    return dx, dy if dy is not None else dx, dp


def hsic_grad(threads):
    programs, parameters = (
        ("sqeuclidean 0 -1; dot 0 20; gaussian 0 0; add 1 2", "absolute 0 -1; laplacian 0 0"),
        np.array([0.5]),
    )
    values, dx, dy = np.empty(3 + 2 * len(X)), np.zeros_like(X), np.zeros_like(Y)
    dp, dq = np.zeros((2, 1))
    _core.hsic(X, Y, parameters, parameters, *programs, True, values, threads)
    _core.hsic_grad(X, Y, parameters, parameters, *programs, True, values, np.ones(3), dx, dy, dp, dq, threads)
    return values, dx, dy, dp, dq


def store_grad(threads, same=False):
    value, points = np.empty((1, len(X), len(Y)), np.float32), (X[None], (X if same else Y)[None])
    _core.store(*points, "euclidean", 2.0, False, same, False, value, threads)
    dx, dy = np.zeros_like(X[None]), None if same else np.zeros_like(Y[None])
    _core.store_grad(*points, "euclidean", 2.0, False, same, False, value, np.sqrt(value), dx, dy, threads)
    return value, dx, dy if dy is not None else dx


def with_threads(function):
    """A public function as one of the number of threads."""

    def run(threads):
        nf.set_num_threads(threads)
        try:
            return function()
        finally:
            nf.set_num_threads(None)

    return run


OPERATIONS = {
    "info_nce": with_threads(lambda: nf.value_and_grad(nf.info_nce_loss, (0, 1))(X, Y, temperature=0.1)),
    "info_nce rows": with_threads(lambda: nf.info_nce_loss(X, Y, temperature=0.1, reduction="none")),
    "clip": with_threads(lambda: nf.value_and_grad(nf.clip_loss, (0, 1))(X, Y)),
    "nt_xent": with_threads(lambda: nf.value_and_grad(nf.nt_xent_loss, (0, 1))(X, Y)),
    "hcl": with_threads(lambda: nf.value_and_grad(nf.hcl_loss, (0, 1))(X, Y)),
    "hcl, cold": with_threads(lambda: nf.value_and_grad(nf.hcl_loss, (0, 1))(X, Y, temperature=0.01)),
    "circle": with_threads(lambda: nf.value_and_grad(nf.circle_loss)(X, np.arange(1003) % 20)),
    "proxy anchor": with_threads(
        lambda: nf.value_and_grad(nf.proxy_anchor_loss, (0, 2))(X, np.arange(1003) % 300, Y[:300])
    ),
    "n_pairs": with_threads(lambda: nf.value_and_grad(nf.n_pairs_loss, (0, 1))(X, Y)),
    "sup_con": with_threads(lambda: nf.value_and_grad(nf.sup_con_loss)(X, np.arange(1003) % 20)),
    "siglip": with_threads(lambda: nf.value_and_grad(nf.siglip_loss, (0, 1))(X, Y)),
    "batch triplet": with_threads(lambda: nf.value_and_grad(nf.batch_triplet_loss)(X[:300], np.arange(300) % 20)),
    "uniformity": with_threads(lambda: nf.value_and_grad(nf.uniformity)(X)),
    "alignment": with_threads(lambda: nf.value_and_grad(nf.alignment, (0, 1))(X, Y)),
    "cdist": with_threads(lambda: nf.cdist(X, Y)),
    "cdist of one set": with_threads(lambda: nf.cdist(X)),
    "cdist of a batch": with_threads(lambda: nf.cdist(X[:1000].reshape(20, 50, 37), Y[:1000].reshape(20, 50, 37))),
    "pdist": with_threads(lambda: nf.pdist(X)),
    "gram": with_threads(lambda: nf.gram(X)),
    "composed gram": with_threads(lambda: (nf.kernels.Matern(3.0) + nf.kernels.Laplacian(9.0))(X, Y)),
    "gram matmul": with_threads(lambda: nf.kernels.Gaussian(3.0).matmul(X, Y, V)),
    "k-means": with_threads(lambda: nf.KMeans(30, random_state=0, max_iter=5).fit(X).cluster_centers_),
    "gram matmul of one set": with_threads(lambda: nf.kernels.Gaussian(3.0).matmul(LONG, None, LONG[:, :7])),
    "matmul_grad": matmul_grad,
    "matmul_grad of one set": lambda threads: matmul_grad(threads, same=True),
    "hsic_grad": hsic_grad,
    "store_grad": store_grad,
    "store_grad of one set": lambda threads: store_grad(threads, same=True),
    "select": lambda threads: select(X, Y, threads),
    "one neighbour": lambda threads: select(X, Y, threads, k=1),
}


def bits(result):
    """Everything in a nested result, as bytes."""
    if isinstance(result, tuple | list):
        return [part for item in result for part in bits(item)]
    return [np.asarray(result).tobytes()]


@pytest.mark.isa
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_bits_do_not_depend_on_the_number_of_threads(operation):
    alone = bits(operation(1))
    for threads in (2, 3, 7):
        assert bits(operation(threads)) == alone, f"{threads} threads differ from one"


def test_bits_do_not_depend_on_the_run():
    """Who takes which task differs from run to run; the result must not."""
    operation = OPERATIONS["info_nce"]
    assert len({tuple(bits(operation(3))) for _ in range(20)}) == 1


# ---- the pool itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 3, 7, 100_000])
@pytest.mark.parametrize("tasks", [1, 2, 1000])
def test_every_task_runs_on_a_worker_that_exists(tasks, threads):
    trace = _core.task_trace(tasks, threads)
    assert len(trace) == tasks
    assert set(trace) <= set(range(max(1, min(tasks, threads, 256))))


def test_no_tasks():
    assert _core.task_trace(0, 4) == []


def test_one_thread_is_the_caller():
    assert set(_core.task_trace(1000, 1)) == {0}


def test_number_of_threads(threads):
    threads(np.int64(2))
    assert nf.get_num_threads() == 2
    for bad, error in ((0, ValueError), (-1, ValueError), (True, TypeError), (1.5, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="^n: expected"):
            nf.set_num_threads(bad)


def test_pool_grows_and_shrinks_between_calls():
    for threads in (2, 7, 1, 3, 64, 2) * 50:
        assert max(_core.task_trace(200, threads)) < threads


# ---- several Python threads at once ----------------------------------------------------------------------------------


def test_callers_side_by_side_get_their_own_results():
    sets = [rng.standard_normal((301 + 7 * k, 19)).astype(np.float32) for k in range(8)]
    expected = [bits(select(x, x, 1)) for x in sets]
    with ThreadPoolExecutor(8) as callers:
        for _ in range(5):
            assert list(callers.map(lambda x: bits(select(x, x, 3)), sets)) == expected


def test_gil_is_released():
    """The main thread goes on while another one is inside a call."""
    x = rng.standard_normal((20000, 64)).astype(np.float32)
    inside, ticks = threading.Event(), 0
    pause = threading.Event()

    def work():
        inside.set()
        select(x, x, 1)
        inside.clear()

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        ticks += inside.is_set()
        pause.wait(0.001)
    thread.join()
    assert ticks >= 10


HALF_IMPORTED = {
    "cdist": lambda: nf.cdist(X, Y),
    "info_nce": lambda: nf.value_and_grad(nf.info_nce_loss, (0, 1))(X, Y, temperature=0.1),
    "gram matmul": lambda: nf.kernels.Gaussian(3.0).matmul(X, Y, V),
    "k-means": lambda: nf.KMeans(3, n_init=1, random_state=0).fit(X).labels_,
}


@pytest.mark.parametrize("operation", HALF_IMPORTED.values(), ids=HALF_IMPORTED)
def test_while_another_thread_imports_torch(operation, monkeypatch):
    """A module is in sys.modules before anything is in the module."""
    expected = bits(operation())
    for name in ("torch", "cupy", "sklearn.exceptions"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert bits(operation()) == expected
    with pytest.raises(TypeError, match="^x: expected a NumPy, PyTorch or CuPy array, got list"):
        nf.cdist([[1.0]])


# ---- fork ------------------------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
# Python 3.12 warns of what is tested here.
fork_warning = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def _answer(connection, threads):
    connection.send([*bits(select(X, Y, threads)), max(_core.task_trace(1000, threads)) < threads])
    connection.close()


def _ask_a_child(threads):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(there, threads))
    child.start()
    there.close()
    try:
        assert here.poll(TIMEOUT), "the forked child hangs"
        answer = here.recv()
        child.join(TIMEOUT)
        assert child.exitcode == 0
        return answer
    finally:
        if child.is_alive():
            child.kill()
            child.join()


@needs_fork
@fork_warning
def test_child_of_a_fork_has_a_pool():
    expected = [*bits(select(X, Y, 3)), True]
    for _ in range(3):
        assert _ask_a_child(3) == expected
    assert [*bits(select(X, Y, 3)), True] == expected  # and the parent still has its own


FIRST_CALLS = """
    import sys
    import numpy as np
    import nearfar as nf

    x = np.eye(8)
    before = set(sys.modules)
    nf.cdist(x), nf.knn(x, k=1), nf.kernels.Gaussian(1.0).matmul(x, x, x), nf.value_and_grad(nf.info_nce_loss)(x, x)
    nf.KMeans(2).fit(x), nf.KernelPCA(2).fit(x), nf.nystrom("rbf", x, 3), nf.mmd_permutation_test(x, x)
    print(*set(sys.modules) - before)
"""


def test_first_calls_import_nothing():
    """In a child of a fork, a module that another thread was importing is locked for ever."""
    command = [sys.executable, "-c", textwrap.dedent(FIRST_CALLS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n", "")


@needs_fork
@fork_warning
def test_fork_while_another_thread_holds_the_pool():
    expected = [*bits(select(X, Y, 2)), True]
    x = rng.standard_normal((6000, 64)).astype(np.float32)
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            select(x, x, 2)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        for _ in range(5):
            assert _ask_a_child(2) == expected
    finally:
        stop.set()
        thread.join()


# ---- torch's threads -------------------------------------------------------------------------------------------------

BESIDE_TORCH = """
    import os
    import numpy as np
    import torch
    import nearfar as nf
    from nearfar import _core

    x = np.random.default_rng(0).standard_normal((600, 40)).astype(np.float32)
    alone = nf.set_num_threads(1) or nf.cdist(x).tobytes()
    nf.set_num_threads(None)

    torch.set_num_threads(3)
    torch.ones(1_000_000).mul_(2)  # starts torch's threads
    before = len(os.listdir("/proc/self/task"))
    same = [nf.cdist(x).tobytes() == alone, set(_core.task_trace(1000, 3)) <= {0, 1, 2}]
    print(len(os.listdir("/proc/self/task")) - before)

    same += [max(_core.task_trace(1000, 2)) < 2]  # fewer than torch has
    print(len(os.listdir("/proc/self/task")) - before)

    nf.set_num_threads(5)  # more than torch has
    same += [nf.cdist(x).tobytes() == alone, set(_core.task_trace(1000, 5)) <= {0, 1, 2, 3, 4}]
    print(len(os.listdir("/proc/self/task")) - before)

    nf.set_num_threads(3)
    if (child := os.fork()) == 0:  # none of the threads is in the child
        os._exit(0 if nf.cdist(x).tobytes() == alone else 1)
    print(os.waitpid(child, 0)[1], all(same))
"""

# Each child has the thread that forked only: whoever waits for the others waits for ever.
FORKED_BESIDE_TORCH = """
    import os
    import numpy as np
    import torch

    torch.set_num_threads(3)

    def use_torch():
        torch.ones(1_000_000).mul_(2)

    def use_nearfar():
        import nearfar as nf

        nf.cdist(np.ones((600, 40), np.float32))

    def fork(*uses):
        if (child := os.fork()) == 0:
            for use in uses:
                use()
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)

    use_torch()
    fork(use_nearfar, fork)  # imported after the fork
    use_nearfar()  # from here on a fork ends the threads
    fork(use_torch, use_nearfar, lambda: fork(use_nearfar, use_torch))
    use_torch()
    fork(use_nearfar, use_torch)
    use_nearfar()
"""


SMALL_STACKS = """
    import sys
    import torch

    torch.set_num_threads(2)
    torch.ones(1_000_000).mul_(2)
    sys.path.insert(0, {tests!r})
    import test_threads

    for name, operation in test_threads.OPERATIONS.items():
        print(name.replace(" ", "_"), flush=True)  # the last one, if it ends the process
        operation(2)
"""


def beside_torch(script, **environment):
    """What a script prints, word by word, in a process where torch has threads of OpenMP."""
    torch = pytest.importorskip("torch")
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        pytest.skip("this torch has threads of its own")
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_torch_shares_its_threads():
    """No other workers beside torch's, which spin for some time after each of its operations."""
    assert beside_torch(BESIDE_TORCH) == ["0", "0", "4", "0", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems do to OpenMP at a fork is theirs")
def test_forks_beside_torch():
    assert beside_torch(FORKED_BESIDE_TORCH) == ["0"] * 5


def test_small_stacks():
    """The threads are torch's, and so are their stacks."""
    script = SMALL_STACKS.format(tests=os.path.dirname(__file__))
    assert beside_torch(script, OMP_STACKSIZE="128k") == [name.replace(" ", "_") for name in OPERATIONS]


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
    import os, signal, threading
    import numpy as np
    {more}
    from nearfar import _core

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have told us to ignore it
    n, d = 60000, 256
    x = np.random.default_rng(0).standard_normal((1, n, d), dtype=np.float32)
    value, index = np.full((1, n, 1), np.nan, np.float32), np.full((1, n, 1), -1)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        _core.select(x, x, "sqeuclidean", 2.0, False, False, 1, value, index, "automatic", {threads})
    except KeyboardInterrupt:
        # Unwritten rows: it stopped inside the call, and not when that was over.
        print("interrupted", (index == -1).any(), len(_core.task_trace(100, {threads})))
"""


@pytest.mark.parametrize(("threads", "more"), [(1, ""), (2, ""), (2, "import torch; torch.set_num_threads(2)")])
def test_ctrl_c_stops_a_long_call(threads, more):
    if more:
        pytest.importorskip("torch")
    # In a process of its own, where a late signal cannot end the test session.
    script = textwrap.dedent(INTERRUPTED).format(threads=threads, more=more)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=10 * TIMEOUT)
    assert result.stdout.split() == ["interrupted", "True", "100"], result.stderr
