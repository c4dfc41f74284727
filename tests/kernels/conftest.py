"""Each way in which the CPU's kernels are compiled, where this machine can run it."""

import pytest
from variants import VARIANTS, supported

from inferneo_jax.kernels.cpu.build import Variant, library


@pytest.fixture(params=[v for v in VARIANTS if supported(v)])
def variant(request: pytest.FixtureRequest) -> Variant:
    assert library(request.param) is not None
    return request.param
