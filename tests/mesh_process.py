"""One process of the runs that `test_mesh.py` starts; its program is the tests' own.

python tests/mesh_process.py update DEVICES OUT.npz [COORDINATOR ID PROCESSES]
                                       one update on that many CPU devices of each process
python tests/mesh_process.py train DEVICES[:STEP] ...
                                       ghn-train on that many CPU devices; in STEP, SIGTERM comes
"""

import json
import os
import signal
import sys
import zlib

import jax
import numpy as np
import optax
import test_training

from ghn_jax.cli import train as program
from ghn_jax.data.images import train_batches
from ghn_jax.training import loop
from ghn_jax.training.mesh import join_processes, make_mesh
from ghn_jax.training.update import MetaStep

# Half of them with two fully connected layers: dropout.
ARCHITECTURES = [a.replace(fc_layers=1 + i % 2) for i, a in enumerate(test_training.ARCHITECTURES)]


def update(devices: str, out: str, *launch: str) -> None:
    """Saves loss, accuracy and gradient of one update."""
    jax.config.update("jax_num_cpu_devices", int(devices))
    if launch:
        join_processes(launch[0], *map(int, launch[1:]))
    mesh = make_mesh()
    step = MetaStep(test_training.GHN_, optax.sgd(1.0), mesh=mesh)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, test_training.SIZE, test_training.SIZE, 3)).astype(np.float32)
    labels = rng.integers(0, 10, 8).astype(np.int32)
    share = jax.process_index(), jax.process_count()
    batch = test_training.meta_batch(ARCHITECTURES, share=share)
    state = step.init(0)
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = step(state, step.prepare(batch, 8), images, labels)
    gradient = jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params)
    if jax.process_index() == 0:
        np.savez(
            out,
            *jax.tree.leaves(gradient),
            loss=metrics.loss,
            top1=metrics.top1,
            mesh=[*mesh.shape.values()],
        )


class Log(loop.Log):
    """Writes down what each update was of, in `stream.jsonl`; a signal comes in one of them."""

    stop_at = 0
    images: dict[int, int] = {}  # update -> checksum of its batch

    def update(self, step, metrics, batch, waited, validated=None):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self._first:
            architectures = [zlib.crc32(repr(a).encode()) for a in batch.architectures]
            with (self._config.run.out / "stream.jsonl").open("a") as file:
                file.write(json.dumps([step, architectures, self.images[step]]) + "\n")
        return super().update(step, metrics, batch, waited, validated)


def batches(images, size, *, seed, start_step):
    """As training's, with their checksums kept."""
    found = train_batches(images, size, seed=seed, start_step=start_step)
    for step, (pixels, labels) in enumerate(found, start_step + 1):
        Log.images[step] = zlib.crc32(labels.tobytes(), zlib.crc32(pixels.tobytes()))
        yield pixels, labels


def train(devices: str, *arguments: str) -> None:
    """Runs the training program on small architectures."""
    devices, _, stop_at = devices.partition(":")
    jax.config.update("jax_num_cpu_devices", int(devices))
    Log.stop_at = int(stop_at or 0)
    loop.Log, loop.train_batches = Log, batches
    loop.architecture_source = lambda *_: lambda i: ARCHITECTURES[i % 8]
    program.main(list(arguments))


if __name__ == "__main__":
    {"update": update, "train": train}[sys.argv[1]](*sys.argv[2:])
