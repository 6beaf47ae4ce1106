"""The devices of a run: a mesh of rows, which share out architectures, and columns, images.

Architectures differ in the program that runs them, so every row of the mesh runs programs of its
own (MPMD); within a row one program runs on all its devices (SPMD), each with its part of the
images. A row lies within one process, which runs it from a thread of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ARCH, DATA = "arch", "data"


class Row(NamedTuple):
    """One row of the mesh.

    Attributes:
      index: its place on the mesh's axis `arch`.
      mesh: its devices, along the axis `data`.
    """

    index: int
    mesh: Mesh

    @property
    def devices(self) -> list[jax.Device]:
        """The row's devices."""
        return list(self.mesh.devices.flat)

    @property
    def axis(self) -> str | None:
        """The axis that images are divided along; None where there is one device."""
        return DATA if self.mesh.size > 1 else None

    def sharding(self, spec: P) -> NamedSharding:
        """How an array lies on the row's devices."""
        return NamedSharding(self.mesh, spec)


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


def make_mesh(text: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (arch, data) of all devices of all processes.

    Devices are put in the order of their processes, not in that of the network between them (as
    `jax.make_mesh` would on TPUs): a row must lie within a process, and the only exchange between
    rows, one all-reduce over the whole mesh, is the same in any order.

    Args:
      text: see `parse_mesh`; an axis left out gets the devices that are left. All of them are on
        `arch` if None.
      devices: all of JAX's if not given.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or a row would have devices
        of several processes.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    sizes = parse_mesh(text) if text is not None else {DATA: 1}
    product = math.prod(sizes.values())
    if len(sizes) == 1 and len(devices) % product == 0:
        left = ({ARCH, DATA} - set(sizes)).pop()
        sizes[left], product = len(devices) // product, len(devices)
    if product != len(devices):
        raise ValueError(
            f"--mesh {text} is for {product} devices, but there are {len(devices)}; give sizes "
            "whose product is that, or only one of them"
        )
    rows = np.array(devices, dtype=object).reshape(sizes[ARCH], sizes[DATA])
    for i, row in enumerate(rows):
        processes = sorted({d.process_index for d in row})
        if len(processes) > 1:
            each = sum(d.process_index == processes[0] for d in devices)
            raise ValueError(
                f"row {i} of the mesh would have devices of the processes "
                f"{', '.join(map(str, processes))}; the size of 'data' is {sizes[DATA]}, allowed: "
                f"what divides a process's devices, {each}"
            )
    return Mesh(rows, (ARCH, DATA))


def local_rows(mesh: Mesh) -> tuple[Row, ...]:
    """The rows whose devices are this process's, in order."""
    here = jax.process_index()
    return tuple(
        Row(i, Mesh(devices, (DATA,)))
        for i, devices in enumerate(mesh.devices)
        if devices[0].process_index == here
    )


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
    if coordinator is None or coordinator == "auto":
        if process_id is not None or num_processes is not None:
            raise ValueError(
                "--process-id and --num-processes are for runs started by hand; give "
                "--coordinator HOST:PORT with them, or leave them out"
            )
        if coordinator is None:
            return
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--coordinator auto finds no Slurm, Open MPI, Kubernetes or Cloud TPU ({error}); "
                "give --coordinator HOST:PORT, --process-id and --num-processes"
            ) from None
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
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method="deactivate"
    )
