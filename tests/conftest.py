"""Fixtures that several files share."""

import sys

import pytest

import nearfar as nf


@pytest.fixture(autouse=True)
def seeded():
    """Points drawn without a generator are the same in every run: a test that fails fails again."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    """Each kind of array in turn."""
    return request.param


@pytest.fixture
def threads():
    """`nearfar.set_num_threads`, undone afterwards."""
    yield nf.set_num_threads
    nf.set_num_threads(None)
