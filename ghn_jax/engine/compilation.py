"""XLA programs: kept between runs in a folder of the user's choice, and counted."""

from __future__ import annotations

import functools
import logging
import os
import stat
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from ghn_jax.engine.program_digests import check_programs

_log = logging.getLogger(__name__)
PROGRAM_FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def default_program_folder() -> Path:
    """Where compiled programs are kept unless told otherwise: JAX's own variable goes first."""
    return Path(os.environ.get(PROGRAM_FOLDER_VARIABLE, "~/.cache/ghn_jax"))


def keep_programs(folder: str | Path) -> None:
    """Turns on JAX's persistent compilation cache, so that a second run starts in seconds.

    What is in the folder runs as the user: where others may write to it, or it is somebody else's,
    it is not used, and a warning says so. A program that is not as it was written is removed, and
    compiled again.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if problem := _not_private(folder):
        warnings.warn(
            f"compiled programs are not kept: {folder} {problem}; give another --cache-dir, or "
            f"make it yours alone (chmod go-w {folder})",
            stacklevel=2,
        )
        return
    check_programs(folder)
    if jax.config.jax_compilation_cache_dir != str(folder):
        compilation_cache.reset_cache()  # JAX would go on with the first folder of the process
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Most of the engine's programs take less than a second, but there are hundreds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _not_private(folder: Path) -> str:
    """What is wrong with a folder that only the user should write to; empty if nothing is."""
    if not hasattr(os, "getuid"):  # Windows
        return ""
    status = folder.stat()
    if status.st_uid != os.getuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "may be written to by other users"
    return ""


@functools.cache
def _is_known(option: str, value: str | bool) -> bool:
    """Whether the installed XLA takes an option; says so in the log, once, if it does not.

    Nothing lists the options that there are, so a program that does nothing is compiled with it.
    """
    try:
        jax.jit(lambda: 0.0).lower().compile(compiler_options={option: value})
    except jax.errors.JaxRuntimeError as error:
        version = jax.__version__
        _log.warning("programs are compiled without %s in JAX %s: %s", option, version, error)
        return False
    return True


def known_options(options: dict[str, str | bool]) -> dict[str, str | bool]:
    """Those of some options for compiling that the installed XLA knows: they come and go."""
    return {option: value for option, value in options.items() if _is_known(option, value)}


def program_options(device: jax.Device) -> dict[str, str | bool]:
    """Options for the engine's programs on a device.

    On NVIDIA's GPUs nothing is tried out while a program is compiled: candidates for one product or
    convolution are compiled and timed on the device, one program at a time, for longer than most
    programs ever run. cuDNN and cuBLAS choose by their own rules, as they do under PyTorch.

    On CPUs programs are compiled in half the time or less with these. The older loop emitter also
    makes a program of half as many pieces, of which Linux lets a process have only so many
    (`programs.Programs.make_room`); newer versions of XLA do not have it.
    """
    if device.platform == "gpu":
        return known_options({"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False})
    if device.platform != "cpu":
        return {}
    return known_options(
        {
            "xla_backend_optimization_level": "1",
            "xla_llvm_disable_expensive_passes": True,
            "xla_cpu_use_fusion_emitters": False,
            # A program has few pieces: to compile them one by one costs more than it gains.
            "xla_cpu_parallel_codegen_split_count": "1",
        }
    )


def single_run_options() -> dict[str, str | bool]:
    """Options for a program that runs once: the least time to compile it."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return program_options(device)
    return {**program_options(device), "xla_backend_optimization_level": "0"}


class CompilationCounter:
    """Counts the XLA programs that this process compiles or takes from the cache.

    Attributes:
      count: programs so far.
      seconds: time spent on them.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration
