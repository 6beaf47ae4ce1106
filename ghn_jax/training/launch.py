"""Starts the processes of a machine's rows of the mesh: one command for a node of eight GPUs.

Each process sees only the devices of its row. The first one shows the progress; if one fails, the
others are stopped, and its exit code is the command's. SIGTERM and Ctrl-C are handed on: all rows
stop after the same update.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from ghn_jax.training.mesh import ARCH, DATA, mesh_shape, parse_mesh
from ghn_jax.training.stopping import STOPPED

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_STARTED = "GHN_JAX_STARTED"  # set in processes that were started here


def _accelerators() -> int:
    """How many this machine has, asked in another process, which takes none of them; 0 for none."""
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0")):
        return 0
    code = "import jax; print(jax.local_device_count() * (jax.default_backend() != 'cpu'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def rows_here(mesh: str | None, coordinator: str | None, num_processes: int | None):
    """Rows of the mesh on this machine, and the devices of each; (1, None) if it has but one.

    Args:
      mesh: as on the command line; see `mesh.parse_mesh`.
      coordinator, num_processes: as on the command line: how many machines there are.

    Raises:
      ValueError: the mesh is not for the devices that there are.
    """
    if _STARTED in os.environ or coordinator == "auto":
        return 1, None
    machines = num_processes or 1
    sizes = parse_mesh(mesh) if mesh is not None else {}
    accelerators = _accelerators()
    if accelerators:
        rows, columns = mesh_shape(mesh, accelerators * machines)
    elif len(sizes) == 2:
        rows, columns = sizes[ARCH], sizes[DATA]  # a CPU can be any number of devices
    elif sizes:
        rows, columns = mesh_shape(mesh, max(1, jax.config.jax_num_cpu_devices) * machines)
    else:
        return 1, None
    if rows % machines:
        raise ValueError(
            f"--mesh {mesh} has {rows} rows for {machines} machines; allowed: a multiple, as a row "
            "lies within a machine"
        )
    return (rows // machines, columns) if rows > machines else (1, None)


def _environment(row: int, columns: int) -> dict[str, str]:
    """What a process sees: the devices of its row."""
    environment = {**os.environ, _STARTED: "1", "JAX_NUM_CPU_DEVICES": str(columns)}
    if columns > 1:
        # Several CPU devices wait for each other in threads that their work is done by as well.
        environment.setdefault("PJRT_NPROC", str(4 * columns))
    for name in _VISIBLE:
        given = os.environ.get(name)
        devices = given.split(",") if given else [str(i) for i in range((row + 1) * columns)]
        environment[name] = ",".join(devices[row * columns : (row + 1) * columns])
    return environment


def start_rows(
    arguments: Sequence[str],
    rows: int,
    columns: int,
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
) -> int:
    """Runs this program once for each row of this machine; returns the exit code.

    Args:
      arguments: of the command line.
      rows, columns: from `rows_here`.
      coordinator, process_id, num_processes: as on the command line: of the machines.
    """
    if coordinator is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    first, machines = rows * (process_id or 0), num_processes or 1
    processes = []
    for row in range(rows):
        options = [
            *("--coordinator", coordinator, "--process-id", str(first + row)),
            *("--num-processes", str(rows * machines)),
        ]
        command = [sys.executable, sys.argv[0], *arguments, *options]
        # Signals of the terminal come to this process alone, and from here to each row once.
        processes.append(
            subprocess.Popen(command, env=_environment(row, columns), start_new_session=True)
        )

    def hand_on(number: int, frame) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = [code for code in codes if code not in (None, 0, STOPPED)]
            if failed:
                return abs(failed[0])
            if None not in codes:
                return max(codes)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
