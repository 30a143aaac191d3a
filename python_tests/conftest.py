"""Fixtures shared by the op tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "specprefill",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("specprefill")


@pytest.fixture
def backend(request):
    """A backend of the grid (see ``grid.on_backends``); skips with its reason, fails where it must be there."""
    request.param.require()
    return request.param


@pytest.fixture
def threads():
    """Set the number of threads in a test; the former number comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
