"""Networks are trained by jobs of a real Slurm on this machine: `make test-slurm`."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.evaluation.experiments.records import read_records

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="no Slurm: see one_node_slurm.sh"),
]

EDGES = (("conv_1x1", 0), ("skip_connect", 1))
SMALL = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), n_cells=2, C=8, fc_layers=1)
EPOCHS = 30


def command(out: Path, nets: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "ghn_jax.cli.paper", "trained-networks", "--quick", "--nets",
        str(nets), "--out", str(out), "--epochs", str(EPOCHS), *more,
    ]  # fmt: skip


def test_jobs_that_are_killed_lose_nothing_that_was_written(tmp_path):
    """A job is requeued in the middle of a network: results are those of an uninterrupted run."""
    nets = tmp_path / "nets.json"
    nets.write_text(json.dumps({f"net {i}": SMALL.replace(C=8 + 8 * i).to_dict()
                                for i in range(4)}))  # fmt: skip
    out = tmp_path / "out"
    slurm = ("--cluster", "slurm", "--unit-size", "2", "--jobs", "1", "--gpus", "0", "--cpus", "1")
    run = subprocess.Popen(command(out, nets, *slurm))
    deadline = time.monotonic() + 300
    while not list(out.glob("states/*.npz")):  # an epoch is over
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.2)
    jobs = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%A"], capture_output=True, text=True,
                          check=True).stdout.split()  # fmt: skip
    assert len(jobs) == 1
    before = read_records(out)
    subprocess.run(["scontrol", "requeue", jobs[0]], check=True)
    assert run.wait(timeout=600) == 0
    found = read_records(out)
    assert len(found) == 4
    assert {name: found[name] for name in before} == before
    log = "".join(path.read_text() for path in out.glob("jobs/*.err"))
    here = tmp_path / "here"
    subprocess.run(command(here, nets), check=True)
    for name, record in read_records(here).items():
        assert found[name]["loss"] == pytest.approx(record["loss"], rel=1e-4), log
