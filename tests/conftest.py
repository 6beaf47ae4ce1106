"""Common settings of all tests: two CPU devices, and where the shared files are."""

import atexit
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

from ghn_jax.engine import engine
from ghn_jax.engine.compilation import known_options, single_run_options

# Before JAX starts: what is sharded runs on two devices, on any machine. They wait for each other
# in threads that their work is done by as well, so there have to be more than two.
os.environ.setdefault("PJRT_NPROC", "8")
jax.config.update("jax_num_cpu_devices", 2)

# Nearly every program here is compiled to run once: in half the time with these settings. The
# engine's have options of their own, which `engine_for_a_single_run` replaces.
_SHORT_COMPILATION = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# A process that finds one it does not know in XLA_FLAGS ends, and one that has compiled anything
# reads them no more: another one tries them. Workers inherit what the first process sets.
if "PYTEST_XDIST_WORKER" not in os.environ:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        known = pool.apply(known_options, (_SHORT_COMPILATION,))
    flags = (f"--{option}={str(value).lower()}" for option, value in known.items())
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags))
    # Commands keep their programs in a folder of the tests, not in the user's.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ghn-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", None)  # what workers have read at their start


@pytest.fixture(scope="session", autouse=True)
def engine_for_a_single_run():
    """The engine's programs are compiled as all others are; as in training in `test_mesh.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "program_options", lambda device: single_run_options())
        yield


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


# Minutes each: begun first, so that both cores end at about the same time.
_LONG = ("test_parity", "test_training", "test_experiments", "test_engine", "test_network_training")


def pytest_collection_modifyitems(items):
    """Files that take longest come first; all else stays in order."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else 9)
