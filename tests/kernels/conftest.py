"""Each way in which the CPU's kernels are compiled, where this machine can run it."""

import pytest

from inferneo_jax.kernels.cpu.build import Variant, library
from tests.kernels.variants import VARIANTS, supported


@pytest.fixture(params=[v for v in VARIANTS if supported(v)])
def variant(request: pytest.FixtureRequest) -> Variant:
    assert library(request.param) is not None
    return request.param
