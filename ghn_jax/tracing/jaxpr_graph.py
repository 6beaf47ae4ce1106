"""Reads computational graphs from jaxprs, which are no stable API.

`read_graph` interprets the jaxpr of a model's call with `abstract_values` in place of arrays: a
value is what it comes from, a row of a `Flow`, a parameter or a constant. Nothing is executed. What
an equation means is in `layers.py` and `elementwise.py`; beside this file, only `equations.py` and
`initial_values.py` know jaxprs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from ghn_jax.deepnets1m.graph import MAX_GRAPH_NODES, Graph
from ghn_jax.tracing.abstract_values import (
    Activation,
    Constant,
    Parameter,
    Value,
    drop,
    fold,
    image_axes,
    is_integer,
)
from ghn_jax.tracing.equations import (
    CONTROL,
    ELEMENTWISE,
    REDUCTIONS,
    VIEWS,
    inner_jaxpr,
    scan_sizes,
)
from ghn_jax.tracing.findings import Placement, said_of
from ghn_jax.tracing.layers import Layers


class _Reader(Layers):
    """Interprets a jaxpr; see the module's docstring."""

    def run(self, jaxpr, consts: list[Value], inputs: list[Value], stack: str) -> list[Value]:
        """The outputs of a jaxpr."""
        values: dict[Any, Value] = {}

        def read(atom) -> Value:
            if not isinstance(atom, core.Literal):
                return values[atom]
            return Constant(value=np.asarray(atom.val) if is_integer(atom.aval) else None)

        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if all(isinstance(x, Constant) for x in operands):
                outputs = self.constants(eqn, operands, stack)
            else:
                outputs = self.equation(eqn, operands, stack)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def constants(self, eqn, operands, stack: str) -> list[Value]:
        """The outputs of an equation of constants alone."""
        inner = inner_jaxpr(eqn)
        if inner is not None and len(inner.jaxpr.invars) == len(operands):
            return self.run(inner.jaxpr, [Constant() for _ in inner.consts], operands, stack)
        name = eqn.primitive.name
        return [fold(name, operands, eqn.params, v.aval) for v in eqn.outvars]

    def equation(self, eqn, operands: list[Value], stack: str) -> list[Value]:
        """The outputs of an equation of which some operand is no constant."""
        name = eqn.primitive.name
        where = "/".join(part for part in (stack, str(eqn.source_info.name_stack)) if part)
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
        if name in CONTROL:
            return self.control(eqn, operands, shapes, where)
        inner = inner_jaxpr(eqn)
        if inner is not None and len(inner.jaxpr.invars) == len(operands):
            consts = [Constant() for _ in inner.consts]
            return self.run(inner.jaxpr, consts, operands, where)
        if name == "conv_general_dilated":
            return [self.convolution(eqn.params, *operands, shapes[0], where)]
        if name == "dot_general":
            return [self.product(eqn.params, *operands, shapes[0], where)]
        if name.startswith("reduce_window"):
            return [self.window(eqn, operands[0], shapes[0], where)]
        if name in REDUCTIONS:
            return [self.reduce(name, operands[0], eqn.params["axes"], where)]
        if name in ("concatenate", "stack"):
            axis = eqn.params.get("dimension", eqn.params.get("axis"))
            return [self.concatenate(operands, axis, name == "stack", shapes[0], where)]
        if name == "optimization_barrier":
            return operands
        if name in VIEWS and not isinstance(operands[0], Constant):
            others = [x for x in operands[1:] if isinstance(x, Constant)]
            if len(others) == len(operands) - 1:
                x = operands[0]
                return [self.view(eqn, x, others, i, shape) for i, shape in enumerate(shapes)]
        if name == "gather" and any(isinstance(x, Parameter) for x in operands[:1]):
            self.leave(operands[0], f"a table that is indexed {said_of(where)}")
            return [dataclasses.replace(self.activation(operands[1]), axes=image_axes(shapes[0]))]
        if name not in ELEMENTWISE and name not in VIEWS:
            self.note(f"{name} in {{}} is no primitive; edges pass through it", where)
        literals = [getattr(atom, "val", None) for atom in eqn.invars]
        return [self.elementwise(name, operands, literals, shape, where) for shape in shapes]

    # --- Loops and branches ---

    def control(self, eqn, operands, shapes, where: str) -> list[Value]:
        """A loop or a branch: with parameters in it, it is followed turn by turn where it can be.

        Which branch is taken is known where it depends on the number of the turn alone.
        """
        name = eqn.primitive.name
        leaves = {
            leaf for x in operands if isinstance(x, Parameter) for leaf, _ in (x.key, *x.others)
        }
        which = operands[0] if name == "cond" else Constant()
        if isinstance(which, Constant) and which.value is not None:
            branches = eqn.params["branches"]
            branch = branches[int(np.clip(which.value, 0, len(branches) - 1))]
            return self.run(branch.jaxpr, [Constant() for _ in branch.consts], operands[1:], where)
        if leaves and name == "scan":
            return self.turns(eqn, operands, shapes, where)
        if leaves:
            names = ", ".join(sorted(self.names[leaf] for leaf in leaves)[:3])
            raise ValueError(
                f"the model has a `{name}` {said_of(where)} with parameters in it ({names}): how "
                "often it runs, or which branch, depends on values; give a loop a fixed number of "
                "turns (nn.scan, lax.fori_loop with numbers), decide a branch in Python (if ...:)"
            )
        self.note(f"{name} in {{}} is not followed; edges pass through it", where)
        return [self.elementwise(name, operands, [], shape, where) for shape in shapes]

    def turns(self, eqn, operands, shapes, where: str) -> list[Value]:
        """A scan as if it were unrolled: each layer of the stacks that it reads is by itself."""
        length, jaxpr = eqn.params["length"], eqn.params["jaxpr"]
        if length > MAX_GRAPH_NODES:
            raise ValueError(
                f"the model has a `scan` {said_of(where)} of {length} turns with parameters in it; "
                f"allowed: up to {MAX_GRAPH_NODES}, as each is a layer of the graph"
            )
        first, carried = scan_sizes(eqn)
        after = first + carried
        fixed, carry, stacks = operands[:first], operands[first:after], operands[after:]
        consts: list[Value] = [Constant() for _ in jaxpr.consts]
        rows: dict[int, list[Value]] = {}
        order = range(length)
        for turn in reversed(order) if eqn.params["reverse"] else order:
            layers = [self.layer(x, turn) for x in stacks]
            found = self.run(jaxpr.jaxpr, consts, [*fixed, *carry, *layers], where)
            carry, rows[turn] = found[: len(carry)], found[len(carry) :]
        outputs = list(carry)
        for i, shape in enumerate(shapes[len(carry) :]):
            stack = [rows[turn][i] for turn in order]
            constant = all(isinstance(x, Constant) for x in stack)
            outputs.append(
                Constant() if constant else self.concatenate(stack, 0, True, shape, where)
            )
        return outputs

    def layer(self, stack: Value, turn: int) -> Value:
        """One of what is stacked along the first axis."""
        if isinstance(stack, Constant):
            value = None if stack.value is None else stack.value[turn]
            return Constant(stack.state, value)
        if isinstance(stack, Parameter):
            stack = stack.at(0, turn, self.shapes[stack.leaf])
        return dataclasses.replace(stack, axes=drop(stack.axes, 0))


class Reading(NamedTuple):
    """What `read_graph` finds.

    Attributes:
      graph: the computational graph.
      placements: parameter (its number) -> where it comes from, for those that nodes make: a
        placement, or one for each of the layers that are stacked in it.
      reasons: parameter -> why no node makes it, for all others.
      notes: what was mapped to the nearest primitive, or to none, and where.
      outputs: size of the output's last axis: the model's classes.
    """

    graph: Graph
    placements: dict[int, tuple[Placement, ...]]
    reasons: dict[int, str]
    notes: tuple[str, ...]
    outputs: int


def read_graph(
    call: Callable, params, state, sample, names: Sequence[str], virtual_edges: int
) -> Reading:
    """The computational graph of a model's call.

    Args:
      call: (params, state, sample) -> output, an array.
      params, state: trees of the model's parameters and other variables; shapes will do.
      sample: the input, (B, H, W, C); its shape will do.
      names: of the parameters, in the order of `jax.tree.leaves`.
      virtual_edges: see `graph.build_graph`.

    Raises:
      ValueError: loops or branches with parameters that depend on values, no layer that is a
        primitive, or an output that does not depend on the input.
    """
    closed, output = jax.make_jaxpr(call, return_shape=True)(params, state, sample)
    # What does not reach the output is no part of the graph, and decides on nothing.
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, core.Literal)}
    leaves = jax.tree.leaves(params)
    reader = _Reader(names, [leaf.shape for leaf in leaves])
    inputs: list[Value] = [
        Parameter(i, tuple(((axis, n),) for axis, n in enumerate(leaf.shape)))
        for i, leaf in enumerate(leaves)
    ]
    inputs += [Constant(state=True)] * len(jax.tree.leaves(state))
    inputs.append(Activation(0, image_axes(sample.shape)))
    consts: list[Value] = [Constant() for _ in closed.consts]
    (last,) = reader.run(jaxpr, consts, inputs, "")
    if isinstance(last, (Constant, Parameter)):
        raise ValueError("the model's output does not depend on its input; nothing to predict")
    reader.forget_tokens()
    reader.tell_products()
    classes = (output.shape or (1,))[-1]
    graph, kept = reader.flow.graph(reader.activation(last).row, virtual_edges, classes)
    node_of = {row: node for node, row in enumerate(kept)}
    placements, reasons = {}, {}
    for leaf, var in enumerate(jaxpr.invars[: len(leaves)]):
        uses = [use for use in reader.roles.get(leaf, []) if use.node in node_of]
        if uses:
            first = {u.part: u._replace(node=node_of[u.node]) for u in reversed(uses)}
            axes = [axis for axis, _ in uses[0].part]  # of the stack
            parts = sorted(part for part in first if [axis for axis, _ in part] == axes)
            placements[leaf] = tuple(first[part] for part in parts)
            if len(uses) > len(parts):
                reader.note("{} is shared; its first use decides", names[leaf])
        elif var in read:
            reasons[leaf] = reader.reasons.get(leaf, "no primitive stands for how it is used")
        else:
            reasons[leaf] = "it does not reach the output"
    if not placements:
        why = "; ".join(f"{names[leaf]}: {reasons[leaf]}" for leaf in list(reasons)[:5])
        raise ValueError(f"no parameter of the model belongs to one of the primitives ({why})")
    return Reading(graph, placements, reasons, reader.notes(), classes)
