"""The devices of a run: a mesh of rows, which share out architectures, and columns, images.

A row is a process: it runs architectures of its own, and its devices share the images of each. So a
process never waits for another, but for one sum of gradients in an update (`update.py`). On a
machine with several rows, `launch.py` starts their processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

ARCH, DATA = "arch", "data"


def parse_mesh(text: str) -> dict[str, int]:
    """Reads sizes of the mesh's axes, such as 'arch=4,data=2'.

    Raises:
      ValueError: the text names another axis, one twice, or a size that is no whole number from 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in (ARCH, DATA) or name in sizes:
            what = "twice" if name in sizes else "no axis of the mesh"
            raise ValueError(f"--mesh {text} has {name!r}, {what}; give arch=ROWS,data=COLUMNS")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {text} gives {name} the size {size!r}; allowed: 1 or more")
        sizes[name] = int(size)
    return sizes


def mesh_shape(text: str | None, devices: int) -> tuple[int, int]:
    """Rows and columns of the mesh of a number of devices.

    Args:
      text: see `parse_mesh`; an axis left out gets the devices that are left. All of them are on
        `arch` if None.
      devices: of all machines.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = parse_mesh(text) if text is not None else {DATA: 1}
    product = math.prod(sizes.values())
    if len(sizes) == 1 and devices % product == 0:
        left = ({ARCH, DATA} - set(sizes)).pop()
        sizes[left], product = devices // product, devices
    if product != devices:
        raise ValueError(
            f"--mesh {text} is for {product} devices, but there are {devices}; give sizes whose "
            "product is that, or only one of them"
        )
    return sizes[ARCH], sizes[DATA]


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (arch, data) of all devices of all processes: a row for each process.

    Args:
      devices: all of JAX's if not given.

    Raises:
      ValueError: processes have different numbers of devices.
    """
    rows: dict[int, list[jax.Device]] = {}
    for device in sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id)):
        rows.setdefault(device.process_index, []).append(device)
    counts = {len(row) for row in rows.values()}
    if len(counts) > 1:
        raise ValueError(
            f"processes have {sorted(counts)} devices; all rows of the mesh must have as many"
        )
    return Mesh(np.array([*rows.values()], dtype=object), (ARCH, DATA))


def networks_at_once(workers: int | None, mesh: Mesh) -> int:
    """How many networks of a meta-batch run at once, each called by a thread of its own.

    On a CPU they use its cores. On a GPU or TPU the calls take longer than the device's work.
    Where devices share images there is one at a time: all devices must meet them in one order.

    Args:
      workers: what the user wants; None for what is fast.
      mesh: from `make_mesh`.
    """
    if mesh.shape[DATA] > 1:
        return 1
    return workers or (2 if mesh.devices.flat[0].platform == "cpu" else 4)


def join_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> None:
    """Connects this process with the others of a run; does nothing where it is alone.

    Before anything else that JAX does.

    Args:
      coordinator: HOST:PORT that process 0 listens at; 'auto' where JAX finds all by itself, under
        Slurm, Open MPI, Kubernetes (GKE) or on Cloud TPUs.
      process_id: this process, from 0.
      num_processes: how many there are.

    Raises:
      ValueError: what was given does not go together.
    """
    check_processes(coordinator, process_id, num_processes)
    if coordinator is None:
        return
    if coordinator == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--coordinator auto finds no Slurm, Open MPI, Kubernetes or Cloud TPU ({error}); "
                "give --coordinator HOST:PORT, --process-id and --num-processes"
            ) from None
        return
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method="deactivate"
    )


def check_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> None:
    """Raises ValueError where the arguments of `join_processes` do not go together."""
    if coordinator is None or coordinator == "auto":
        if process_id is not None or num_processes is not None:
            raise ValueError(
                "--process-id and --num-processes are for runs started by hand; give "
                "--coordinator HOST:PORT with them, or leave them out"
            )
        return
    if process_id is None or num_processes is None:
        raise ValueError(
            f"--coordinator {coordinator} needs --process-id and --num-processes; or give "
            "--coordinator auto under Slurm, Open MPI, Kubernetes or on Cloud TPUs"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator is {coordinator!r}; allowed: HOST:PORT, or auto")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id is {process_id} of --num-processes {num_processes}; allowed: 0 to "
            f"{num_processes - 1}"
        )
