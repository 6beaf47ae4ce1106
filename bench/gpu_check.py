"""The engine on an accelerator, in one call: is it right, and how fast is it?

    make gpu-check                                                # or:
    python bench/gpu_check.py --out gpu.json --minutes 4

Every result is written to the JSON file as soon as it is there. Parts that cannot run are reported,
and the next one runs. Without an accelerator all of it runs on the CPU: a rehearsal.

1. Loss and gradient of meta-batches beside the same on the CPU, at the highest matmul precision.
2. Seconds of an update (of GHN-2: meta-batch 8, batch 64, 32x32): the whole, the host's part, and
   the device's by a profile; seconds of compiling; programs; memory.
3. With --reference, the authors' code (PyTorch) on the same device and meta-batches.
4. The same in bfloat16.
5. What the host pays for the walks alone.

`make gpu-train` trains.
"""

from __future__ import annotations

import cProfile
import dataclasses
import gzip
import io
import json
import os
import platform
import pstats
import statistics
import sys
import tempfile
import time
import traceback
import typing
from contextlib import closing
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from ghn_jax.cli.deepnets1m import export
from ghn_jax.data.images import prefetch
from ghn_jax.deepnets1m import DeepNets1M
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import NormSum
from ghn_jax.engine.compilation import (
    CompilationCounter,
    keep_programs,
)
from ghn_jax.engine.engine import Engine
from ghn_jax.engine.programs import Programs
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.training.config import preset
from ghn_jax.training.decoding import Tiles
from ghn_jax.training.mesh import make_mesh, networks_at_once
from ghn_jax.training.meta_batch import Stream, make_meta_batch
from ghn_jax.training.update import MetaStep

Part = Literal["updates", "reference", "correctness", "bfloat16", "walk"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("gpu_check.json")  # results
    minutes: float = 5.0  # all of it, roughly
    updates: int = 40  # timed meta-batches at most
    preset: str = "ghn2"  # of ghn-train; demo: a rehearsal in a minute or two
    parts: tuple[Part, ...] = typing.get_args(Part)  # what to run, in this order
    profile: Path | None = None  # folder for the profiles of two updates; not kept if not given
    reference: Path | None = None  # the authors' code, a checkout of facebookresearch/ppuda
    cache_dir: Path | None = None  # compiled programs; none are kept if not given


class Results:
    """A JSON file that always holds all there is."""

    def __init__(self, path: Path):
        self.path, self.data = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, value) -> None:
        """Adds a part and writes the file."""
        self.data[name] = value
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)
        print(f"{name}: {json.dumps(value)[:400]}", flush=True)


def about() -> dict:
    """What it runs on."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.local_device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
    }


class Case:
    """The meta-batches that are run."""

    def __init__(self, name: str, nets: Path | None = None):
        config = preset(name)
        self.config, self.size = config, 16 if config.data.dataset == "digits" else 32
        self.ghn: GHN = config.ghn(Task(10, self.size))
        self.rules = config.space.rules(self.size)
        self.nets = nets and DeepNets1M.open(
            nets, "train", image_size=self.size, rules=self.rules, seed=0
        )

    def architecture(self, i: int):
        """Of the training stream, or of an official file."""
        if self.nets is not None:
            return self.nets[i % len(self.nets)]
        return sample_architecture("train", 0, i, rules=self.rules)

    def stream(self) -> Stream:
        """Of the training meta-batches."""
        return Stream(
            self.ghn, self.architecture, self.config.space.meta_batch, self.size,
            graph_nodes=self.config.space.graph_nodes,
        )  # fmt: skip

    def images(self, count: int):
        """Noise."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal((count, self.size, self.size, 3), np.float32)
        return images, rng.integers(0, 10, count).astype(np.int32)


def correctness(case: Case, programs: Programs, architectures: int) -> dict:
    """Relative differences of loss and gradient between the device and the CPU."""
    images, labels = case.images(16)
    found = [case.architecture(1000 + i) for i in range(architectures)]
    batch = make_meta_batch(case.ghn, found, image_size=case.size)
    results = []
    with jax.default_matmul_precision("highest"):
        for device in (jax.local_devices()[0], jax.devices("cpu")[0]):
            start = time.perf_counter()
            step = MetaStep(case.ghn, optax.identity(), mesh=make_mesh([device]), programs=programs)
            with closing(step), jax.default_device(device):
                update = step.prepare(batch, len(images))
                params = step._local(step.init(0).params)
                arrays = jax.device_put((images, labels), step.engine.split)
                totals, gradient = step.gradient(params, update, *arrays, np.int32(0))
                results.append((np.array(totals), np.asarray(gradient)))
            print(f"{device.platform}: {time.perf_counter() - start:.1f} s", flush=True)
    (totals, gradient), (expected, reference) = results
    losses = np.abs(totals[:, 0] / expected[:, 0] - 1)
    error = np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
    return {
        "networks": architectures,
        "worst_loss": float(losses.max()),
        "gradient": float(error),
        "passed": bool(losses.max() < 1e-3 and error < 1e-3),
    }


def _device_time(folder: Path) -> dict | None:
    """Seconds that a profile's device was busy, and what with: programs, and kernels by name."""
    files = sorted(folder.rglob("*.trace.json.gz"))
    if not files:
        return None
    with gzip.open(files[-1], "rt") as file:
        events = json.load(file)["traceEvents"]
    devices = {
        e["pid"]
        for e in events
        if e.get("name") == "process_name" and "/device:" in e["args"]["name"]
    }
    ran = [e for e in events if e.get("pid") in devices and e.get("ph") == "X"]
    ran = sorted((e for e in ran if "hlo_module" in e.get("args", {})), key=lambda e: e["ts"])
    busy, end, totals = 0.0, 0.0, {"programs": {}, "kernels": {}}
    for e in ran:
        stop = e["ts"] + e["dur"]
        busy += max(0.0, stop - max(e["ts"], end))
        end = max(end, stop)
        for kind, name in (("programs", e["args"]["hlo_module"]), ("kernels", e["name"][:60])):
            count, seconds = totals[kind].get(name, (0, 0.0))
            totals[kind][name] = count + 1, seconds + e["dur"] / 1e6
    most = {
        kind: dict(sorted(found.items(), key=lambda item: -item[1][1])[:25])
        for kind, found in totals.items()
    }
    return {"busy_seconds": busy / 1e6, "events": len(ran), **most}


def updates(
    case: Case, options: Options, programs: Programs, dtype: str, seconds: float, report
) -> dict:
    """Times updates: meta-batches run once, for some seconds, then again, nothing beside them."""
    counter, cpu = CompilationCounter(), jax.default_backend() == "cpu"
    size = case.config.data.batch_size
    images, labels = case.images(size)

    def make(workers: int) -> MetaStep:
        return MetaStep(
            case.ghn, case.config.optimiser.make(1000, 300_000), workers=workers,
            dtype=jnp.dtype(dtype), programs=programs,
        )  # fmt: skip

    start, found = time.perf_counter(), {"dtype": dtype}
    found["workers"] = networks_at_once(None, make_mesh())
    with closing(make(found["workers"])) as step:
        state, ran, known, host, whole = step.init(0), [], len(programs), [], []
        ahead = (step.prepare(batch, size) for batch in case.stream().batches(0))
        with closing(prefetch(ahead, size=2)) as prepared:
            while len(ran) < options.updates and (not ran or time.perf_counter() < start + seconds):
                ran.append(next(prepared))
                state, metrics = jax.block_until_ready(step(state, ran[-1], images, labels))
                found.setdefault("first_update", time.perf_counter() - start)
                found |= {
                    "meta_batches": len(ran),
                    "positions": [u.batch.position for u in ran],
                    "loss": float(metrics.loss),
                    "programs": len(programs) - known,
                    "compile_thread_seconds": counter.seconds,
                    "with_compilation": time.perf_counter() - start,
                }
                report(found)
        programs.wait()
        for update in ran:
            begin = time.perf_counter()
            state, metrics = step(state, update, images, labels)
            host.append(time.perf_counter() - begin)
            jax.block_until_ready(metrics)
            whole.append(time.perf_counter() - begin)
        found |= {
            "seconds": [round(s, 5) for s in whole],
            "seconds_median": statistics.median(whole),
            "seconds_mean": statistics.fmean(whole),
            "seconds_slowest": max(whole),
            "host_median": statistics.median(host),
        }
        report(found)
        profile = cProfile.Profile()
        profile.enable()
        state, metrics = step(state, ran[0], images, labels)
        profile.disable()
        jax.block_until_ready(metrics)
        text = io.StringIO()
        pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(12)
        found["host_profile"] = [line.strip() for line in text.getvalue().splitlines() if line][3:]
        if not cpu:
            with tempfile.TemporaryDirectory() as folder:
                folder = (options.profile or Path(folder)) / dtype
                begin = time.perf_counter()
                with jax.profiler.trace(str(folder)):
                    for update in ran[:2]:
                        state, metrics = step(state, update, images, labels)
                    jax.block_until_ready(metrics)
                found["profiled_seconds"] = (time.perf_counter() - begin) / len(ran[:2])
                found["profile_of_two"] = _device_time(folder)
        report(found)
    # One behind the other, as training runs them, by threads that issue networks.
    found["seconds_queued"] = {}
    for workers in (1, 2, 4) if dtype == "float32" else (found["workers"],):
        with closing(make(workers)) as step:
            again = [step.prepare(update.batch, size) for update in ran]
            programs.wait()
            state, metrics = step(step.init(0), again[0], images, labels)
            jax.block_until_ready(metrics)
            begin = time.perf_counter()
            for update in again:
                state, metrics = step(state, update, images, labels)
            jax.block_until_ready(metrics)
            found["seconds_queued"][workers] = (time.perf_counter() - begin) / len(again)
            report(found)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {**found, "peak_bytes": memory.get("peak_bytes_in_use")}


class NoPrograms:
    """In place of the engine's programs, compiled ones that do nothing but take and give arrays."""

    calls = 0

    def get(self, key, make):
        """A program of as many results as the real one has."""
        kind = key[0][0] if isinstance(key[0], tuple) else key[0]
        unit = key[0][1] if isinstance(key[0], tuple) else None
        normed = isinstance(unit, NormSum)
        if kind == "forward":
            n = unit.normed_terms if normed else 0
            function = jax.jit(
                lambda *a: (_first(a[1]), (_first(a[1]),) * n) if normed else _first(a[1])
            )
        elif kind == "backward":
            function = jax.jit(lambda *a: (a[0], a[1]), keep_unused=True)
        else:
            function = jax.jit(lambda *a: a[0], keep_unused=True)

        def call(*args):
            NoPrograms.calls += 1
            return function(*args)

        return call


def _first(arrays):
    return next(x for x in arrays if x is not None)


def walk(case: Case) -> dict:
    """Host time of a meta-batch's walks alone, every program replaced by one that does nothing."""
    engine, form, seconds, calls = Engine(programs=NoPrograms()), Tiles(case.ghn), [], 0
    plans = next(case.stream().batches(0)).plans
    networks = [engine.prepare(plan, 8, form, gradient=True) for plan in plans]
    images, dlogits = jnp.zeros((8, case.size, case.size, 3)), jnp.zeros((8, 10))
    for _ in range(5):
        NoPrograms.calls = 0
        start = time.perf_counter()
        for plan, network in zip(plans, networks, strict=True):
            params = {n: (dlogits,) for step in plan.steps for n in step.names}
            _, trace = engine.forward(network, params, images, keep=True)
            engine.backward(network, params, trace, dlogits)
        seconds.append(time.perf_counter() - start)
        calls = NoPrograms.calls
    return {"networks": len(plans), "calls": calls, "seconds": min(seconds)}


def theirs(case: Case, options: Options, nets: Path, updates: dict, count: int) -> dict:
    """The authors' update on the same device and on the first of our meta-batches."""
    from reference import Reference

    reference = Reference("update", options.reference, nets, case.config.data.batch_size)
    seconds, size = [], case.config.space.meta_batch
    ours = updates["seconds"][:count]
    for end in updates["positions"][:count]:
        indices = list(range(end - size, end))
        found = [case.architecture(i) for i in indices]
        request = {
            "indices": indices,
            "C": [a.C for a in found],
            "fc_dim": [a.fc_dim for a in found],
        }
        reference(**request)
        seconds.append(min(reference(**request)["seconds"] for _ in range(2)))
    return {
        "seconds": seconds,
        "ours": ours,
        "seconds_median": statistics.median(seconds),
        "times_as_fast_median": statistics.median(seconds) / statistics.median(ours),
        **reference.about,
    }


def main(options: Options) -> int:
    """Runs all parts; the exit code says whether any failed."""
    start = time.perf_counter()
    if options.cache_dir is not None:
        keep_programs(options.cache_dir)
    results, failed = Results(options.out), 0
    results.add("about", about())
    with tempfile.TemporaryDirectory() as folder, closing(Programs()) as programs:
        nets = None
        if options.reference is not None:
            export("train", Path(folder), num=16 * options.updates)
            nets = Path(folder) / "deepnets1m_train.hdf5"
        case = Case(options.preset, nets)

        def timed(dtype: str, share: float) -> dict:
            name = "updates" if dtype == "float32" else dtype
            seconds = 60 * options.minutes * share
            return updates(case, options, programs, dtype, seconds, lambda x: results.add(name, x))

        parts = {
            "updates": lambda: timed("float32", 0.3),
            "reference": lambda: theirs(case, options, nets, results.data["updates"], 3),
            "correctness": lambda: correctness(case, programs, 2),
            "bfloat16": lambda: timed("bfloat16", 0.15),
            "walk": lambda: walk(case),
        }
        for name in options.parts:
            if name == "reference" and nets is None:
                continue
            try:
                begin = time.perf_counter()
                value = parts[name]()
                results.add(name, {**value, "part_seconds": round(time.perf_counter() - begin, 1)})
                failed += value.get("passed") is False
            except Exception:  # the next part may still say something
                failed += 1
                results.add(name, {"error": traceback.format_exc()[-2000:]})
    results.add("seconds", round(time.perf_counter() - start, 1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
