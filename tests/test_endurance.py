"""Long runs: nothing grows, and a run that is killed again and again loses nothing.

`make test-endurance` makes 3,000 updates of the demonstration and kills another run 30 times, and
prints the figures; the short form, with a few small architectures, is one of the ordinary tests.
The program runs as users run it, in processes of its own; what they use is read from /proc.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")

ROOT = Path(__file__).parents[1]
# Few programs, so that a process makes its first update in seconds.
FEW = ("--n-cells", "1", "1", "--nodes", "1", "1", "--batch-size", "8")


class Form(NamedTuple):
    """How long a test is.

    Attributes:
      updates, options: of the run whose figures must stay flat, after its first `warm` updates.
      saves: checkpoints from its first fifth after that to its last one.
      program_growth: programs that may be new in its last third, as a share of all.
      killed_updates, killed_options, kills: of the run that is killed.
    """

    updates: int
    warm: int
    options: tuple[str, ...]
    saves: int
    program_growth: float
    killed_updates: int
    killed_options: tuple[str, ...]
    kills: int


SHORT_OPTIONS = (*FEW, "--training-architectures", "2", "--save-every", "5")
SHORT = Form(60, 20, SHORT_OPTIONS, 6, 0.0, 60, SHORT_OPTIONS, 2)
WHOLE = Form(
    3000, 200, ("--batch-size", "8", "--save-every", "100"), 22, 0.02,
    600, (*FEW, "--training-architectures", "8", "--save-every", "7"), 30,
)  # fmt: skip
FORMS = [
    pytest.param(SHORT, id="short"),
    pytest.param(WHOLE, id="whole", marks=pytest.mark.endurance),
]


class Sample(NamedTuple):
    """What a process uses at a time.

    Attributes:
      update: the last one in its metrics; 0 before the first.
      memory: resident, in MiB.
      threads, files: their numbers; files are open descriptors.
    """

    update: int
    memory: float
    threads: int
    files: int


class Folder:
    """A run's folder, and the processes that train in it."""

    def __init__(self, out: Path, cache: Path, updates: int, options: tuple[str, ...]):
        self.out, self._metrics = out, out / "metrics.jsonl"
        self._command = [
            sys.executable, "-m", "ghn_jax.cli.train", "--preset", "demo", "--resume", "auto",
            "--out", str(out), "--cache-dir", str(cache), "--steps", str(updates), *options,
        ]  # fmt: skip

    def start(self) -> subprocess.Popen:
        """A process that goes on with the run."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (self.out.parent / f"{self.out.name}.log").open("a") as log:
            return subprocess.Popen(self._command, env=environment, stdout=log, stderr=log)

    def last(self) -> int:
        """Number of the last update whose metrics are whole."""
        if not self._metrics.exists():
            return 0
        with self._metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.endswith(b"}")]
        return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0

    def records(self) -> list[dict]:
        """All metrics."""
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def finish(self) -> list[Sample]:
        """Makes all updates that are left, and looks at the process on its way."""
        samples = []
        with self.start() as process:
            while process.poll() is None:
                if (update := self.last()) and (sample := _sample(process.pid, update)):
                    samples.append(sample)
                time.sleep(0.1)
        assert process.returncode == 0, self.log()
        return samples

    def log(self) -> str:
        """The end of what the processes have said."""
        return (self.out.parent / f"{self.out.name}.log").read_text()[-3000:]


def _sample(pid: int, update: int) -> Sample | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - entries come and go
        return Sample(update, int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), files)
    except (OSError, KeyError):  # it has just ended
        return None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that nothing interrupts, each made once: options -> folder and samples."""
    made, folder = {}, tmp_path_factory.mktemp("endurance")

    def run(updates: int, options: tuple[str, ...]) -> tuple[Folder, list[Sample]]:
        if (updates, options) not in made:
            place = Folder(folder / f"run {len(made)}", folder / "cache", updates, options)
            made[updates, options] = place, place.finish()
        return made[updates, options]

    return run


def judge(title: str, figures: list[tuple[str, float, float]]) -> None:
    """Prints a table of figures, each with the most that is allowed; fails where one is above."""
    lines = [f"\n{title}", f"{'':<48}{'found':>12}{'at most':>12}"]
    for what, found, most in figures:
        missed = "" if found <= most else "  <-- too much"
        lines.append(f"{what:<48}{found:>12,.4g}{most:>12,.4g}{missed}")
    print("\n".join(lines))
    assert all(found <= most for _, found, most in figures), "\n".join(lines)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_grows(form, runs):
    """Memory, threads and open files of the last fifth are those after the first updates."""
    start = time.monotonic()
    folder, samples = runs(form.updates, form.options)
    warm = [sample for sample in samples if sample.update > form.warm]
    fifth = (form.updates - form.warm) / 5
    early = [s for s in warm if s.update <= form.warm + fifth]
    # After the last update a process gives back what it has.
    late = [s for s in warm if form.updates - fifth < s.update < form.updates]
    assert early
    assert late

    def both(name, of):
        return [of([getattr(s, name) for s in some]) for some in (early, late)]

    memory = both("memory", statistics.median)
    # The least: a checkpoint that is written has threads and files for a while. Pools come and go;
    # a leak would be a thread or a file for each checkpoint.
    threads, files = both("threads", min), both("files", min)
    programs = [record["compilations"] for record in folder.records()]
    new = programs[-1] - programs[2 * len(programs) // 3]
    judge(
        f"{form.updates:,} updates ({time.monotonic() - start:.0f} s), from update {form.warm} on",
        [
            (f"memory, MiB (at first {memory[0]:,.0f})", memory[1], 1.1 * memory[0]),
            (f"threads (at first {threads[0]:.0f})", threads[1], threads[0] + form.saves // 2),
            (f"open files (at first {files[0]:.0f})", files[1], files[0] + form.saves // 2),
            (f"programs new in the last third (of {programs[-1]:,})", new,
             form.program_growth * programs[-1]),
        ],
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_killed_again_and_again(form, runs, tmp_path):
    """`kill -9` at random moments: after an update and a while, or while the process starts."""
    start = time.monotonic()
    whole, _ = runs(form.killed_updates, form.killed_options)
    cache = whole.out.parent / "cache"
    killed = Folder(tmp_path / "killed", cache, form.killed_updates, form.killed_options)
    rng = random.Random(0)
    lost = 0
    moments = sorted(rng.sample(range(1, form.killed_updates), form.kills))
    for i, after in enumerate(moments):
        starting = i % 5 == 0
        with killed.start() as process:
            time.sleep(rng.uniform(0, 4) if starting else 0)
            while not starting and killed.last() < after:
                assert process.poll() is None, killed.log()
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        if process.returncode == -signal.SIGKILL:
            lost += killed.last() - (Checkpoints(killed.out).latest() or 0)
    killed.finish()
    one, other = whole.records(), killed.records()
    steps = [record["step"] for record in other]
    numbers = ("loss", "top1", "grad_norm", "nodes", "architectures")
    wrong = sum(any(a[n] != b[n] for n in numbers) for a, b in zip(one, other, strict=False))
    params = [load_ghn(folder.out)[1] for folder in (whole, killed)]
    pairs = zip(*map(jax.tree.leaves, params), strict=True)
    differing = sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in pairs)
    judge(
        f"{form.killed_updates} updates, killed {form.kills} times "
        f"({time.monotonic() - start:.0f} s); {lost} updates were made again",
        [
            ("parameters with other bits", differing, 0),
            ("updates with other metrics", wrong, 0),
            ("gaps and repeats in metrics.jsonl",
             sum(a != b for a, b in zip(steps, range(1, form.killed_updates + 1), strict=False))
             + abs(len(steps) - form.killed_updates), 0),
        ],
    )  # fmt: skip
