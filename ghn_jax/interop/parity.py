"""What outputs of the authors' implementation are compared with ours, and how.

A folder holds `index.json` with the `.npz` files that it lists (graphs, embeddings, parameters,
logits of networks), `random_{ghn}_cifar10.pt` or `random_{ghn}.safetensors` checkpoints,
`images.npy` (which may be in a folder beside it), `gradient_{ghn}.npz` with `_nets.json`, and
`deepnets1m/*.hdf5` with their meta files; and what `parity_ghn3.py` says. Whatever of it is there
is checked. A report for each file has the worst relative error of each kind,
||ours - theirs|| / ||theirs|| of a tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from ghn_jax.deepnets1m import DeepNets1M
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph, build_graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.engine.compilation import single_run_options
from ghn_jax.engine.engine import Engine, weights_of
from ghn_jax.engine.plan import make_plan
from ghn_jax.evaluation.batch_statistics import apply_on_batch
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop import parity_ghn3
from ghn_jax.interop.comparison import compare_graphs, match_nodes, relative_error
from ghn_jax.interop.torch_ghn import load_torch_ghn, to_torch_tensors
from ghn_jax.interop.torch_network import to_torch
from ghn_jax.tracing.model_graph import model_graph
from ghn_jax.tracing.prediction import predict_model
from ghn_jax.training.meta_batch import make_meta_batch
from ghn_jax.training.meta_loss import cross_entropy
from ghn_jax.training.update import MetaStep
from ghn_jax.zoo import MODELS

TOLERANCES = {
    "graph": 0.0,  # nodes or edges that differ
    "embedding": 1e-4,
    "states": 1e-4,  # on the way to it
    "parameters": 1e-4,
    "logits": 1e-3,
    "loss": 1e-4,
    "gradient": 1e-3,
    "count": 0.0,  # of parameters
}
ROUNDINGS = 64  # see `check_gradient`


@dataclasses.dataclass(frozen=True)
class Report:
    """One file: the worst error of each kind, or why it was not checked.

    Kinds that are not in `TOLERANCES` are told and not judged.
    """

    file: str
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything in the file was checked and is within its tolerance."""
        return not self.problem and all(
            e <= TOLERANCES.get(kind, np.inf) for kind, e in self.errors.items()
        )

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        parts = [f"{kind} {error:.1e}" if error else f"{kind} exact"
                 for kind, error in self.errors.items()]  # fmt: skip
        return f"{verdict} {self.file:<34} {self.problem or ', '.join(parts)}"


# --- Networks -------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """A network of `index.json` with predicted parameters.

    Attributes:
      graph: its computational graph.
      tensors: the parameters under PyTorch's names.
      logits: images -> logits, batch norm on the statistics of the batch.
    """

    graph: Graph
    tensors: Mapping[str, np.ndarray]
    logits: Callable[[jax.Array], jax.Array]


def _built(ghn: GHN, variables, arch: Architecture, size: int, engine: Engine) -> _Candidate:
    """A network of the design space, whose graph is built without tracing it."""
    graph = ghn.graph(arch, image_size=size)
    params = ghn.predict(variables, graph)
    plan = make_plan(build_network(arch, ghn.num_classes, size).wiring())

    def logits(images):
        ready = engine.prepare(plan, len(images), gradient=False)
        return engine.forward(ready, weights_of(plan, params), images)[0]

    return _Candidate(graph, to_torch(params, graph), logits)


def _traced(ghn: GHN, variables, name: str, size: int) -> _Candidate:
    """A model of the zoo, traced as any Flax model is."""
    if name not in MODELS:
        raise ValueError(f"no network {name!r} here; known are {', '.join(MODELS)}")
    model = MODELS[name](ghn.num_classes, size)
    sample = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    predicted, _ = predict_model(ghn, variables, model, sample, strict=True)
    params = {"params": predicted["params"]}
    logits = jax.jit(
        lambda x: apply_on_batch(model, predicted, x), compiler_options=single_run_options()
    )
    return _Candidate(
        model_graph(model, sample, ghn.virtual_edges), to_torch(params, model), logits
    )


def _digest_error(ours: np.ndarray, digest: np.ndarray, head: np.ndarray) -> float:
    """Worst error of a tensor of which only sums and the first values are known."""
    flat = ours.astype(np.float64).reshape(-1)
    total = np.abs(flat).sum()
    have = [flat.mean(), flat.std(), total, (flat * np.cos(np.arange(len(flat)))).sum()]
    # A mean near zero is as exact as the numbers that it is of, and so is the weighted sum.
    scale = [total / len(flat), digest[1], digest[2], digest[2]]
    worst = max(abs(h - d) / (abs(s) or 1.0) for h, d, s in zip(have, digest, scale, strict=True))
    return max(float(worst), relative_error(flat[: len(head)], head))


def _parameter_error(params: Mapping[str, np.ndarray], shapes: Mapping, file: Mapping) -> float:
    """Worst error of all predicted tensors."""
    if {n: list(x.shape) for n, x in params.items()} != {n: list(s) for n, s in shapes.items()}:
        return float("inf")
    errors = []
    for name, ours in params.items():
        if f"param/{name}" in file:
            errors.append(relative_error(ours, file[f"param/{name}"]))
        else:
            errors.append(_digest_error(ours, file[f"digest/{name}"], file[f"head/{name}"]))
    return max(errors)


def check_network(
    entry: Mapping, file: Mapping, ghn: GHN, variables, images, engine: Engine
) -> dict[str, float]:
    """Errors of one network: graph, embedding, parameters and logits."""
    net, size = entry["net"], 224 if entry.get("imagenet") else 32
    if "torchvision" in net:
        candidate = _traced(ghn, variables, net["torchvision"], size)
    else:
        candidate = _built(ghn, variables, Architecture.from_dict(net), size, engine)
    graph = candidate.graph
    wrong, order = match_nodes(entry, file, graph)
    errors = {"graph": float(wrong)}
    if "embedding" in file:
        states = np.asarray(ghn.embed(variables, graph))[order]
        errors["embedding"] = relative_error(states, file["embedding"])
    errors["parameters"] = _parameter_error(candidate.tensors, entry["param_shapes"], file)
    count = sum(x.size for x in candidate.tensors.values())
    errors["count"] = float(abs(count - entry.get("num_params", count)))
    if "logits" in file:
        errors["logits"] = relative_error(candidate.logits(images), file["logits"])
    return errors


# --- Gradients ------------------------------------------------------------------------------------


def _engine_step(ghn: GHN, arch: Architecture, images, labels):
    """From variables to loss, logits and gradient of a network as training computes them."""
    step = MetaStep(ghn, optax.identity())
    update = step.prepare(make_meta_batch(ghn, [arch], image_size=images.shape[1]), len(images))

    def run(variables):
        params = variables["params"]
        logits = step.logits(params, update, images)[0]
        (totals,), gradient = step.gradient(params, update, images, labels, np.int32(0))
        return totals[0], logits, {"params": ravel_pytree(params)[1](gradient)}

    return run


def _definition_step(ghn: GHN, arch: Architecture, images, labels):
    """The same by the network's Flax module."""
    graph, network = ghn.graph(arch), build_network(arch, ghn.num_classes, images.shape[1])

    def loss(variables):
        params = ghn.predict(variables, graph)
        logits = network.apply({"params": params}, images)
        return cross_entropy(logits, labels), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=single_run_options())

    def run(variables):
        (value, logits), gradient = step(variables)
        return value, logits, gradient

    return run


def _rounded_otherwise(variables, seed: int):
    """The same variables to within the rounding of float32: each a unit in the last place off."""
    rng = np.random.default_rng(seed)

    def neighbour(x):
        x = np.asarray(x)
        return np.nextafter(x, np.where(rng.random(x.shape) < 0.5, -np.inf, np.inf).astype(x.dtype))

    return jax.tree.map(neighbour, variables)


def _gradient_error(ghn: GHN, gradients: list, file: Mapping) -> float:
    mean = jax.tree.map(lambda *g: np.mean(g, 0), *gradients)
    errors = [
        relative_error(ours, file[f"grad/{name}"])
        for name, ours in to_torch_tensors(ghn, mean).items()
    ]
    return max(*errors, relative_error(optax.global_norm(mean), file["grad_norm"]))


def check_gradient(file: Mapping, nets: list, ghn: GHN, variables, images, make_step):
    """Errors of one training step's logits and gradient.

    A gradient jumps where a ReLU's input changes sign or a max-pool's largest input changes place.
    At the file's own variables an input may lie within float32's rounding of such a point, and then
    either side is right: in float64, this package and the authors' network agree with each other
    and not with the authors' float32 gradient. So where the gradient is not theirs at the
    variables, it must be theirs with one network's taken at variables that differ in nothing but
    the last bit, one of `ROUNDINGS` draws.
    """
    labels = jnp.asarray(file["labels"])
    errors, losses, gradients, steps = [], [], [], []
    for i, net in enumerate(nets):
        step = make_step(ghn, Architecture.from_dict(net), images, labels)
        value, logits, gradient = step(variables)
        losses.append(float(value))
        errors.append(relative_error(logits, file["logits"][i]))
        gradients.append(gradient)
        steps.append(step)
    errors.append(relative_error(losses, file["loss_per_arch"]))
    worst = at_variables = _gradient_error(ghn, gradients, file)
    for seed, i in itertools.product(range(ROUNDINGS), range(len(nets))):
        if worst <= TOLERANCES["gradient"]:
            break
        _, _, gradient = steps[i](_rounded_otherwise(variables, seed))
        worst = min(
            worst, _gradient_error(ghn, [*gradients[:i], gradient, *gradients[i + 1 :]], file)
        )
    result = {"logits": max(errors), "gradient": worst}
    return result if worst == at_variables else {**result, "gradient, last bit as is": at_variables}


# --- DeepNets-1M ----------------------------------------------------------------------------------


def check_nets(path: Path, split: str) -> dict[str, float]:
    """Errors of the graphs and parameter counts of an official file's split."""
    nets = DeepNets1M.open(path, split)
    meta = json.loads(path.with_name(path.stem + "_meta.json").read_text())[split]["nets"]
    wrong = counts = 0
    for i, entry in enumerate(meta):
        stored, built = nets.graph(i), build_graph(nets[i], 250)
        from_, to = np.nonzero(stored.distances)
        edges = np.stack([from_, to, stored.distances[from_, to]], 1).astype(int)
        theirs = list(zip(stored.names, stored.primitives, stored.cells.tolist(), strict=True))
        primitives = [PRIMITIVES[p] for p in built.primitives]
        ours = list(zip(built.names, primitives, built.cells.tolist(), strict=True))
        wrong += compare_graphs((ours, built.edges), (theirs, edges))[0]
        wrong += abs(len(edges) - len(built.edges))
        arch = Architecture.from_dict(entry).replace(C=32, fc_dim=256)
        for size, key in ((32, "cifar10"), (224, "imagenet")):
            if key in entry.get("num_params", {}):
                count = count_parameters(arch, num_classes=10, image_size=size)
                counts += count != entry["num_params"][key]
    return {"graph": float(wrong), "count": float(counts)}


# --- A folder -------------------------------------------------------------------------------------


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """What there is to check in a folder: name -> the errors of each kind.

    Raises:
      FileNotFoundError: there is nothing to check.
    """
    index = folder / "index.json"
    files = sorted((folder / "deepnets1m").glob("*.hdf5"))
    if not index.is_file() and not files:
        raise FileNotFoundError(
            f"{folder} holds nothing to check; expected index.json or deepnets1m/*.hdf5"
        )
    entries = json.loads(index.read_text()) if index.is_file() else []
    found = [p for p in (folder, *sorted(folder.parent.glob("*"))) if (p / "images.npy").is_file()]
    images, engine = None, Engine()
    if found:
        images = jnp.asarray(np.load(found[0] / "images.npy").transpose(0, 2, 3, 1))
    loaded: dict[str, tuple] = {}

    def ghn(name: str):
        if name not in loaded:
            names = f"random_{name}_cifar10.pt", f"random_{name}.safetensors"
            there = [folder / n for n in names if (folder / n).is_file()]
            loaded[name] = load_torch_ghn(there[0] if there else folder / names[0])
        return loaded[name]

    def network(entry):
        with np.load(folder / entry["file"]) as file:
            return check_network(entry, dict(file), *ghn(entry["ghn"]), images, engine)

    def gradient(path, nets, make_step):
        with np.load(path) as file:
            model = ghn(path.stem.removeprefix("gradient_"))
            return check_gradient(dict(file), nets, *model, images, make_step)

    for entry in entries:
        yield entry["file"], functools.partial(network, entry)
    yield from parity_ghn3.checks(folder, entries, ghn, images)
    for path in sorted(folder.glob("gradient_*.npz")):
        beside = path.with_name(path.stem + "_nets.json")
        if not beside.is_file():
            continue  # one of `parity_ghn3`
        nets = json.loads(beside.read_text())
        for way, step in (("engine", _engine_step), ("definition", _definition_step)):
            yield f"{path.name} ({way})", functools.partial(gradient, path, nets, step)
    for path in files:
        for split in json.loads(path.with_name(path.stem + "_meta.json").read_text()):
            yield f"{path.name}[{split}]", functools.partial(check_nets, path, split)


def report(name: str, check: Callable[[], dict[str, float]]) -> Report:
    """The report of one check; what cannot be checked is reported, not raised."""
    try:
        return Report(name, check())
    except (ValueError, KeyError, OSError) as error:
        return Report(name, problem=f"not checked: {error}")


def check_folder(folder: Path) -> Iterator[Report]:
    """Checks whatever a folder holds, file by file; see `checks`."""
    for name, check in checks(folder):
        yield report(name, check)
