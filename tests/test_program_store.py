import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ghn_jax.compilation import CompilationCounter
from ghn_jax.mesh import local_rows, make_mesh
from ghn_jax.program_store import ProgramStore
from ghn_jax.row_programs import RowFunction, RowPrograms

TRACED = []


def scaled_loop(factor, x, steps):
    """A program with kernels, a loop and a donated argument."""
    TRACED.append(factor)
    return jax.lax.fori_loop(0, steps, lambda i, x: jnp.tanh(x @ x.T) @ x * factor, x)


FUNCTION = RowFunction(scaled_loop, (P(), P()), P(), donate=(0,))
ROWS = local_rows(make_mesh("arch=2", jax.devices()[:2]))


@pytest.fixture
def folder(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    TRACED.clear()
    return tmp_path / "programs"


def run(programs: RowPrograms, row=ROWS[0], factor=0.5, size=8) -> np.ndarray:
    x = jax.device_put(
        np.linspace(-1, 1, size * 4, dtype=np.float32).reshape(size, 4), row.devices[0]
    )
    return np.asarray(programs(row, FUNCTION, (factor,), x, np.int32(3)))


def test_a_program_is_traced_once_for_all_processes_and_rows(folder):
    expected = run(RowPrograms())
    assert len(TRACED) == 1
    assert len(list(folder.iterdir())) == 1
    counter, again = CompilationCounter(), RowPrograms()
    for row in (ROWS[1], ROWS[0]):
        np.testing.assert_array_equal(run(again, row), expected)
    assert len(TRACED) == 1
    assert counter.count == again.count == 2
    # Loaded where it is to run.
    assert again(ROWS[1], FUNCTION, (0.5,), jnp.ones((8, 4)), np.int32(1)).devices() == {
        ROWS[1].devices[0]
    }


def test_the_programs_not_used_for_longest_are_forgotten(folder):
    programs, sizes = RowPrograms(), (8, 16, 24, 32)
    results = {size: run(programs, size=size) for size in (*sizes, 8)}
    counter = CompilationCounter()
    programs.forget_half()
    assert programs.count == 2
    for size, loaded in ((8, 0), (32, 0), (24, 1)):
        np.testing.assert_array_equal(run(programs, size=size), results[size])
        assert counter.count == loaded
    assert len(TRACED) == len(sizes)


def test_other_programs_have_other_names(folder):
    for changes in ({}, {"factor": 0.25}, {"size": 16}):
        run(RowPrograms(), **changes)
    with jax.default_matmul_precision("float32"):
        run(RowPrograms())
    assert len(TRACED) == len(list(folder.iterdir())) == 4
    assert not np.array_equal(run(RowPrograms()), run(RowPrograms(), factor=0.25))
    assert len(TRACED) == 4


def test_a_damaged_file_is_made_again(folder):
    expected = run(RowPrograms())
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    np.testing.assert_array_equal(run(RowPrograms()), expected)
    assert len(TRACED) == 2
    np.testing.assert_array_equal(run(RowPrograms()), expected)
    assert len(TRACED) == 2
    assert list(folder.iterdir()) == [path]


class Factor(float):
    """Of a class that the package knows nothing of."""


def test_programs_of_other_code_are_not_kept(folder):
    for _ in range(2):
        run(RowPrograms(), factor=Factor(0.5))
    assert len(TRACED) == 2
    assert not list(folder.iterdir())


def test_files_of_other_users_are_not_read(folder, monkeypatch):
    store = ProgramStore()
    store.save("a", b"a")
    assert store.load("a") == b"a"
    monkeypatch.setattr(os, "getuid", lambda: (folder / "a").stat().st_uid + 1)
    assert store.load("a") is None


def test_a_folder_that_takes_nothing_ends_no_run(folder):
    expected = run(RowPrograms())
    programs = RowPrograms()
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="is not kept in"):
        np.testing.assert_array_equal(run(programs), expected)


def test_programs_that_nobody_uses_are_removed(folder):
    store = ProgramStore()
    for name in ("old", "used"):
        store.save(name, name.encode())
        os.utime(folder / name, (0, time.time() - 40 * 24 * 3600))
    assert store.load("used") == b"used"
    store = ProgramStore()
    assert store.load("used") == b"used"
    assert store.load("old") is None


def test_nothing_is_kept_without_a_folder():
    assert jax.config.jax_compilation_cache_dir is None
    store = ProgramStore()
    store.save("a", b"a")
    assert store.load("a") is None
