"""`nearfar.distributed` over gloo, with 1, 2 and 3 processes.

Starting a process costs seconds, so each world is started once and runs every check of `distributed_worker.py`; a test
here reports one of them.
"""

import queue as queues

import distributed_worker
import pytest
import torch
import torch.multiprocessing as multiprocessing

import nearfar as nf

pytestmark = [
    pytest.mark.isa,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """size -> {name: what ranks have said}; a world is started when it is first asked for."""
    context = multiprocessing.get_context("spawn")
    finished = {}

    def world(size):
        if size in finished:
            return finished[size]
        path = str(tmp_path_factory.mktemp("world") / str(size))
        results = context.Queue()
        processes = [
            context.Process(target=distributed_worker.run, args=(rank, size, path, results)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        said = {name: {} for name in distributed_worker.CHECKS}
        try:
            for _ in range(size * len(said)):
                rank, name, text = results.get(timeout=120)
                said[name][rank] = text
        except queues.Empty:
            pass
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
        finished[size] = said
        return said

    return world


@pytest.mark.parametrize("name", distributed_worker.CHECKS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_world(worlds, size, name):
    said = worlds(size)[name]
    assert sorted(said) == list(range(size)), "a rank has not come to this check"
    errors = [f"rank {rank}:\n{text}" for rank, text in sorted(said.items()) if text]
    assert not errors, "\n".join(errors)


def test_no_process_group():
    x = torch.ones(2, 3)
    for call in (
        lambda: nf.distributed.clip_loss(x, x),
        lambda: nf.distributed.gram_matmul(x, None, x),
        lambda: nf.distributed.KMeans(1).fit(x),
    ):
        with pytest.raises(RuntimeError, match="no process group; call torch.distributed.init_process_group"):
            call()
