"""What the installed XLA is asked for: its flags and options differ between versions."""

import logging
import os

import jax
import pytest

from ghn_jax.engine import compilation
from ghn_jax.engine.compilation import (
    keep_programs,
    known_options,
    program_options,
    single_run_options,
)

UNKNOWN = {"xla_an_option_that_no_version_has": True}
KNOWN = {"xla_backend_optimization_level": "0"}


@pytest.fixture(autouse=True)
def nothing_tried():
    compilation._is_known.cache_clear()


def test_an_unknown_option_is_left_out_and_said_once(caplog):
    with caplog.at_level(logging.WARNING, "ghn_jax"):
        for _ in range(2):
            assert known_options({**KNOWN, **UNKNOWN}) == KNOWN
    (record,) = caplog.records
    assert "xla_an_option_that_no_version_has" in record.getMessage()
    assert jax.__version__ in record.getMessage()


@pytest.mark.parametrize("options", [lambda: program_options(jax.devices()[0]), single_run_options])
def test_programs_are_compiled_with_what_is_asked_for(options):
    assert "xla_backend_optimization_level" in options()
    assert jax.jit(lambda x: x + 1, compiler_options=options())(1.0) == 2


def test_these_tests_are_compiled_in_a_short_time():
    assert "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]


def kept() -> str | None:
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_in_a_folder_of_the_users(tmp_path):
    theirs = tmp_path / "programs" / "simulation.f90"
    theirs.parent.mkdir()
    theirs.write_text("program thesis")
    os.utime(theirs, (0, 0))
    keep_programs(tmp_path / "cache")
    assert kept() == str(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    keep_programs(tmp_path)
    assert theirs.read_text() == "program thesis"


def test_a_process_may_go_on_with_another_folder(tmp_path):
    for name in ("one", "two"):
        keep_programs(tmp_path / name)
        jax.jit(lambda x: x * 3 + 1)(1.0)  # not the same function: compiled, or read, again
        assert len(list((tmp_path / name).glob("*lambda*-cache"))) == 1


@pytest.mark.parametrize("mode", [0o770, 0o757])
def test_programs_that_others_could_have_written_are_not_used(tmp_path, mode):
    tmp_path.chmod(mode)
    before = kept()
    with pytest.warns(UserWarning, match="may be written to by other users; give another"):
        keep_programs(tmp_path)
    assert kept() == before


def test_programs_of_another_user_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    with pytest.warns(UserWarning, match="belongs to another user"):
        keep_programs(tmp_path)
