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


JOB = r"""#!/bin/sh
#SBATCH --requeue --signal=TERM@60 --open-mode=append --output={log}
exec {python} -m ghn_jax.cli.train --preset demo --n-cells 3 3 --widths 8 --meta-batch 2 \
  --batch-size 8 --steps {steps} --save-every 1000 --resume auto --out {out} --cache-dir {cache}
"""
STEPS = 300


def test_training_that_is_requeued_goes_on_by_itself(tmp_path):
    """`scontrol requeue` in the middle: it is saved, starts again, and ends."""
    out, log, script = tmp_path / "run", tmp_path / "log", tmp_path / "job.sh"
    script.write_text(
        JOB.format(log=log, python=sys.executable, steps=STEPS, out=out, cache=tmp_path / "cache")
    )
    submit = ["sbatch", "--parsable", str(script)]
    job = subprocess.run(submit, capture_output=True, text=True, check=True).stdout.strip()
    deadline = time.monotonic() + 600

    def steps() -> list[int]:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def wait_for(condition) -> None:
        while not condition():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)

    wait_for(lambda: len(steps()) >= 3)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for(lambda: "is saved, and --resume goes on from there" in log.read_text())
    done = len(steps())
    assert 3 <= done < STEPS
    assert steps() == list(range(1, done + 1))
    wait_for(lambda: f"{STEPS} updates;" in log.read_text())  # Slurm waits before it starts again
    assert steps() == list(range(1, STEPS + 1))
    assert log.read_text().count("SIGTERM: this update is finished and saved") == 1
