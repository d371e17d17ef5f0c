"""Fixtures that several files share."""

import pytest

import nearfar as nf


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    """Each kind of array in turn."""
    return request.param


@pytest.fixture
def threads():
    """`nearfar.set_num_threads`, undone afterwards."""
    yield nf.set_num_threads
    nf.set_num_threads(None)
