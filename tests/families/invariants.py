"""What has to hold of the report of every model, whatever it is built of."""

from collections import Counter
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ghn_jax
from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.tracing.model_graph import trace_once, unwrap
from ghn_jax.tracing.named_axes import bind_axes
from ghn_jax.tracing.outputs import choose_output

IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
GHN = ghn_jax.GHN(max_shape=(16, 16, 11, 11), features=8)
DEAD = "it does not reach the output"


class Case(NamedTuple):
    """A model and what is right of it.

    Attributes:
      make: () -> the model.
      nodes: primitive -> how many nodes it has, for all but the input and those with none.
      left: end of a parameter's path -> part of the reason why it is left; for all that are.
      notes: parts of the report's notes, in order.
      call: keyword arguments of the model's call.
      training: those of its call in training, which has the same graph.
      output: see `predict_model`.
      sample: an input.
    """

    make: object
    nodes: dict
    left: dict = {}
    notes: tuple = ()
    call: dict = {}
    training: dict = {}
    output: str | int | None = None
    sample: jax.ShapeDtypeStruct = IMAGES


def counts(graph) -> dict:
    """Nodes of each primitive but the input."""
    found = Counter(PRIMITIVES[p] for p in graph.primitives)
    assert found.pop("input") == 1
    return dict(found)


def graph_of(model, case: Case, call: dict):
    """The graph that `predict_model` reads; a Linen module is not traced twice."""
    options = {"initial": None, "seed": 0, "output": case.output, "call": {**case.call, **call}}
    module, _ = unwrap(model, None)
    return trace_once(module, case.sample, GHN.virtual_edges, **options).reading.graph


def check(case: Case) -> None:
    """A model's graph and report are as the case says, and true."""
    with jax.numpy_rank_promotion("raise"):
        model, report = case.make(), None
        ghn_variables = jax.eval_shape(GHN.init_variables, 0)

        def predicted(variables):
            nonlocal report
            options = {"output": case.output, **case.call}
            found, report = ghn_jax.predict_model(GHN, variables, model, case.sample, **options)
            return nnx.split(found)[1] if isinstance(found, nnx.Module) else found

        variables = jax.eval_shape(predicted, ghn_variables)
        graph = graph_of(model, case, {})
        assert counts(graph) == case.nodes
        if case.training:
            trained = graph_of(model, case, case.training)
            np.testing.assert_array_equal(trained.primitives, graph.primitives)
            np.testing.assert_array_equal(trained.edges, graph.edges)
        initial, norms = gradients(model, case)
        assert_same_forms(variables, initial)
    assert_true(report, case, norms)


def assert_same_forms(variables, initial) -> None:
    """Predicted variables have the shapes, the types and the tree of the initial ones."""
    assert jax.tree.structure(variables) == jax.tree.structure(initial)
    for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(initial), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def assert_true(report, case: Case, norms: dict) -> None:
    """Each tensor is reported once, and what is said of it is so."""
    paths = [p.path for p in report.parameters]
    assert sorted(paths) == sorted(norms)
    for p in report.parameters:
        assert (norms[p.path] == 0) == (p.note == DEAD), (p.path, p.note, norms[p.path])
    unknown = [p for p in report.left if not why(p.path, case.left)]
    assert not unknown
    for p in report.left:
        assert why(p.path, case.left) in p.note, p.path
    for end in case.left:
        assert any(why(p.path, {end: "it"}) for p in report.left), end
    assert len(report.notes) == len(case.notes), report.notes
    for note, part in zip(report.notes, case.notes, strict=True):
        assert part in note


def why(path: str, left: dict) -> str:
    """The reason that a case gives for a parameter."""
    ends = [end for end in left if ("/" + path).endswith(f"/{end}" * bool(end))]
    return left[max(ends, key=len)] if ends else ""


def gradients(model, case: Case):
    """The initial variables' shapes, and the gradient's norm of each parameter at random values.

    Initial zeros would hide one parameter behind another.
    """
    module, _ = unwrap(model, None)
    draw = np.random.default_rng(0)
    x = draw.standard_normal(case.sample.shape).astype(np.float32)

    def values(shape):
        fan = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 4
        return (draw.standard_normal(shape.shape) / np.sqrt(fan)).astype(shape.dtype)

    if isinstance(module, nn.Module):
        call = dict(case.call)
        rngs = {"params": jax.random.key(0), **call.pop("rngs", {})}
        initial = jax.eval_shape(bind_axes(lambda x: module.init(rngs, x, **call)), x)
        state = {n: jax.tree.map(lambda v: np.ones(v.shape, v.dtype), tree)
                 for n, tree in initial.items() if n != "params"}  # fmt: skip
        params = jax.tree.map(values, initial["params"])

        def run(params):
            return module.apply(
                {"params": params, **state}, x, rngs=rngs, mutable=[*state, "a"], **call
            )[0]
    else:
        definition, abstract, rest = nnx.split(module, nnx.Param, ...)
        initial = nnx.split(module)[1]
        params = jax.tree.map(values, abstract)

        def run(params):
            call = {
                name: nnx.clone(value) if isinstance(value, nnx.Rngs) else value
                for name, value in case.call.items()
            }
            return nnx.merge(definition, params, jax.tree.map(jnp.asarray, rest))(x, **call)

    @bind_axes
    def loss(params):
        y = choose_output(run(params), case.output)
        return (y * np.sin(np.arange(y.size, dtype=np.float32)).reshape(y.shape)).sum()

    found = jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(params))[0]
    return initial, {_path(at): float(jnp.abs(value).sum()) for at, value in found}


def _path(at) -> str:
    keys = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in at]
    return "/".join(filter(None, keys))
