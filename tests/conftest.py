"""Common settings of all tests: two CPU devices, and where the shared files are."""

import os
from pathlib import Path

import jax
import pytest

# Before JAX starts: what is sharded runs on two devices, on any machine.
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True)
def no_programs_of_other_tests():
    """No test finds programs that another one kept: it may have changed the code they come from."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden outputs and samples; tests that need it skip where it is absent."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("GHN_JAX_SHARED", root.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"no golden files at {path}; set GHN_JAX_SHARED")
    return path
