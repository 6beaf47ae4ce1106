"""Reads computational graphs from jaxprs: the only file that knows them, as they are no stable API.

`read_graph` interprets the jaxpr of a model's call with `abstract_values` in place of arrays: a
value is what it comes from, a row of a `Flow`, a parameter or a constant. Nothing is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from ghn_jax.deepnets1m.graph import MAX_GRAPH_NODES, Graph
from ghn_jax.tracing.abstract_values import (
    BATCH,
    CHANNEL,
    LANE,
    RUNNING,
    SPACE,
    UNKNOWN,
    Activation,
    Axes,
    Constant,
    Key,
    Parameter,
    Scope,
    Statistic,
    Value,
    drop,
    fold,
    image_axes,
    is_integer,
    labels_of,
    looked_up_axes,
    merge,
    product_axes,
    regroup,
    resize,
    spatial_axes,
    unknown_axes,
)
from ghn_jax.tracing.flow import SCORES, THROUGH, Flow


class Placement(NamedTuple):
    """Where a node's tensor goes: `model_graph.place` puts it there.

    Attributes:
      node: of the graph.
      tensor: which of the node's tensors: 'kernel', 'embedding', 'scale' or 'bias'.
      roles: of each of the parameter's axes: 'h', 'w', 'i' (in) or 'o' (out) in a kernel or a
        vector, 's' (position) or 'c' (channel) in an embedding, '' for an axis of size 1.
      skip: positions of an embedding before the grid (class tokens), which the node does not make.
      part: of a parameter that layers are stacked in: (axis, index) for each axis of the stack.
    """

    node: int
    tensor: str
    roles: tuple[str, ...]
    skip: int = 0
    part: tuple[tuple[int, int], ...] = ()


# --- Primitives of JAX ----------------------------------------------------------------------------

# They leave values as they are, ...
_SAME = {
    "convert_element_type", "copy", "stop_gradient", "reduce_precision", "sharding_constraint",
    "device_put", "name", "real", "pvary",
}  # fmt: skip
# ... or lay them out otherwise.
_VIEWS = _SAME | {
    "reshape", "transpose", "squeeze", "broadcast_in_dim", "rev", "slice", "dynamic_slice", "pad",
    "gather", "split", "unstack", "tile", "bitcast_convert_type",
}  # fmt: skip
_REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "argmax", "argmin",
}  # fmt: skip
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "max", "min", "neg", "exp", "exp2", "log", "log1p", "expm1", "tanh",
    "logistic", "erf", "erfc", "erf_inv", "abs", "sign", "square", "sqrt", "rsqrt", "cbrt", "pow",
    "integer_pow", "select_n", "clamp", "sin", "cos", "tan", "floor", "ceil", "round", "rem",
    "atan2",
    "gt", "lt", "ge", "le", "eq", "ne", "and", "or", "not", "xor", "is_finite", "nextafter",
    "add_any", "lgamma", "digamma", "asin", "acos", "atan", "sinh", "cosh", "asinh",
    "acosh", "atanh", "shift_left", "shift_right_logical", "shift_right_arithmetic", "imag",
    "complex", "conj", "population_count", "clz",
}  # fmt: skip
_CONTROL = {"scan", "while", "cond"}


def _inner(eqn):
    """The jaxpr that an equation calls once, or None."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        jaxpr = eqn.params.get(key)
        if jaxpr is not None:
            return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())
    return None


class _Reader:
    """Interprets a jaxpr; see the module's docstring.

    Attributes:
      flow: the rows so far.
      names, shapes: of the parameters.
      roles: parameter -> its placement by each row that uses it, in order; `node` is the row.
      reasons: parameter -> why no node makes it.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        self.flow = Flow()
        self.names, self.shapes = names, shapes
        self.roles: dict[int, list[Placement]] = {}
        self.reasons: dict[int, str] = {}
        self._notes: dict[str, dict[str, None]] = {}

    # --- Equations ---

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
        inner = _inner(eqn)
        if inner is not None and len(inner.jaxpr.invars) == len(operands):
            return self.run(inner.jaxpr, [Constant() for _ in inner.consts], operands, stack)
        name = eqn.primitive.name
        return [fold(name, operands, eqn.params, v.aval) for v in eqn.outvars]

    def equation(self, eqn, operands: list[Value], stack: str) -> list[Value]:
        """The outputs of an equation of which some operand is no constant."""
        name = eqn.primitive.name
        where = "/".join(part for part in (stack, str(eqn.source_info.name_stack)) if part)
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
        if name in _CONTROL:
            return self.control(eqn, operands, shapes, where)
        inner = _inner(eqn)
        if inner is not None and len(inner.jaxpr.invars) == len(operands):
            consts = [Constant() for _ in inner.consts]
            return self.run(inner.jaxpr, consts, operands, where)
        if name == "conv_general_dilated":
            return [self.convolution(eqn.params, *operands, shapes[0], where)]
        if name == "dot_general":
            return [self.product(eqn.params, *operands, shapes[0], where)]
        if name.startswith("reduce_window"):
            return [self.window(eqn, operands[0], shapes[0], where)]
        if name in _REDUCTIONS:
            return [self.reduce(name, operands[0], eqn.params["axes"], where)]
        if name in ("concatenate", "stack"):
            axis = eqn.params.get("dimension", eqn.params.get("axis"))
            return [self.concatenate(operands, axis, name == "stack", shapes[0], where)]
        if name == "optimization_barrier":
            return operands
        if name in _VIEWS and not isinstance(operands[0], Constant):
            others = [x for x in operands[1:] if isinstance(x, Constant)]
            if len(others) == len(operands) - 1:
                x = operands[0]
                return [self.view(eqn, x, others, i, shape) for i, shape in enumerate(shapes)]
        if name == "gather" and any(isinstance(x, Parameter) for x in operands[:1]):
            self.leave(operands[0], f"a table that is indexed {_at(where)}")
            return [dataclasses.replace(self.activation(operands[1]), axes=image_axes(shapes[0]))]
        if name not in _ELEMENTWISE and name not in _VIEWS:
            self.note(f"{name} in {{}} is no primitive; edges pass through it", where)
        literals = [getattr(atom, "val", None) for atom in eqn.invars]
        return [self.elementwise(name, operands, literals, shape, where) for shape in shapes]

    def note(self, text: str, where: str = "") -> None:
        """Tells the user something; `{}` in the text is where, a module or a parameter."""
        self._notes.setdefault(text, {})[where or "the model"] = None

    def notes(self) -> tuple[str, ...]:
        """What was told: a line for each kind, with a count."""
        lines = []
        for text, places in self._notes.items():
            first = ", ".join([*places][:2]) + (", ..." if len(places) > 2 else "")
            times = f"{len(places)} times: " if len(places) > 1 else ""
            lines.append(times + text.replace("{}", first))
        return tuple(lines)

    def leave(self, p: Parameter, reason: str) -> None:
        """No node makes this parameter, unless another use of it does."""
        self.reasons.setdefault(p.leaf, reason)
        self.leave_others(p)

    def leave_others(self, p: Parameter) -> None:
        """Of parameters that are combined, a node makes one at most."""
        for leaf, _ in p.others:
            if leaf != p.leaf:
                why = f"combined with {self.name_of(p.key)} before it is used"
                self.reasons.setdefault(leaf, why)

    def name_of(self, key: Key) -> str:
        """'layers/conv/kernel', or 'layers/conv/kernel[3]' of the fourth in a stack."""
        leaf, part = key
        return self.names[leaf] + "".join(f"[{index}]" for _, index in part)

    def shape_of(self, key: Key) -> tuple[int, ...]:
        """The shape of a parameter, or of one in a stack, whose axes have size 1."""
        leaf, part = key
        stacked = dict(part)
        return tuple(1 if axis in stacked else n for axis, n in enumerate(self.shapes[leaf]))

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
                f"the model has a `{name}` {_at(where)} with parameters in it ({names}): how often "
                "it runs, or which branch, depends on values; give a loop a fixed number of turns "
                "(nn.scan, lax.fori_loop with numbers), decide a branch in Python (if ...:)"
            )
        self.note(f"{name} in {{}} is not followed; edges pass through it", where)
        return [self.elementwise(name, operands, [], shape, where) for shape in shapes]

    def turns(self, eqn, operands, shapes, where: str) -> list[Value]:
        """A scan as if it were unrolled: each layer of the stacks that it reads is by itself."""
        length, jaxpr = eqn.params["length"], eqn.params["jaxpr"]
        if length > MAX_GRAPH_NODES:
            raise ValueError(
                f"the model has a `scan` {_at(where)} of {length} turns with parameters in it; "
                f"allowed: up to {MAX_GRAPH_NODES}, as each is a layer of the graph"
            )
        first, carried = _scan_sizes(eqn)
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

    # --- Values ---

    def activation(self, value: Value) -> Activation:
        """A value as the input of a layer. A statistic over positions is a `glob_avg` node."""
        if isinstance(value, Activation):
            return value
        gone = value.scope.reduced - value.scope.kept
        if SPACE in value.scope.reduced and not gone & {BATCH, CHANNEL, UNKNOWN}:
            if SPACE in value.scope.kept:
                self.note("average pooling to a fixed size is taken for a global one")
            if value.other:
                self.note(f"global pooling by {value.other} is taken for an average (glob_avg)")
            return Activation(self.flow.join("glob_avg", [value.row]), value.axes)
        return Activation(value.row, value.axes)

    def place(self, p: Parameter, row: int, tensor: str, roles: dict, skip: int = 0) -> bool:
        """Notes that a row makes a parameter.

        Args:
          p: the parameter.
          row: its row.
          tensor: see `Placement`.
          roles: axis of the parameter -> role.
          skip: see `Placement`.

        Returns:
          Whether it can.
        """
        self.leave_others(p)
        shape = self.shape_of(p.key)
        if p.changed:
            self.leave(p, f"the model applies {p.changed} to it before it is used")
            return False
        missing = [axis for axis, n in enumerate(shape) if n > 1 and axis not in roles]
        if missing:
            self.leave(p, f"only a part of it is used at a time (axis {missing[0]})")
            return False
        axes = tuple(roles.get(axis, "") if n > 1 else "" for axis, n in enumerate(shape))
        self.roles.setdefault(p.leaf, []).append(Placement(row, tensor, axes, skip, p.part))
        return True

    def forget_tokens(self) -> None:
        """Leaves class tokens that something is added to, as a residual does: they are no biases.

        What is added to activations and used otherwise as well, concatenated say, is a token.
        """
        tokens = self.roles.keys() & self.reasons.keys()
        for row in self.flow.rows:
            if row.primitive == "bias" and row.weight and row.weight[0] in tokens:
                self.roles.pop(row.weight[0], None)
                row.primitive, row.shape = THROUGH, None

    def weight(self, p: Parameter, primitive: str, source: int, axes: dict, where: str) -> int:
        """Adds the row of a kernel.

        Args:
          p: the parameter.
          primitive: 'conv', 'sep_conv' or 'dil_conv'.
          source: the row that it reads.
          axes: role -> the axes of the value `p` that have it, for each dimension of PyTorch's
            shape.
          where: the module.
        """
        full = self.shapes[p.leaf]
        roles, sizes = {}, []
        for role, at in axes.items():
            atoms = [atom for axis in at for atom in p.axes[axis]]
            mine = {label: role for label, n in atoms if n > 1 and label != UNKNOWN}
            # Of a tensor used in parts, the shape is the whole one's.
            whole = len(mine) == sum(n > 1 for _, n in atoms)
            sizes.append(
                math.prod(full[a] for a in mine) if whole else math.prod(n for _, n in atoms)
            )
            roles |= mine
        if p.rescaled and not p.changed:
            self.note(
                "the model rescales {} before it is used (weight or spectral norm)",
                self.names[p.leaf],
            )
        row = self.flow.add(
            primitive, [source], shape=tuple(sizes), name=self.name_of(p.key), weight=p.key
        )
        self.place(p, row, "kernel", roles)
        return row

    # --- Layers ---

    def convolution(self, params, x: Value, p: Value, shape, where: str) -> Value:
        """conv_general_dilated."""
        numbers = params["dimension_numbers"]
        if isinstance(x, (Constant, Parameter)) or not isinstance(p, Parameter):
            if not isinstance(p, Constant):
                self.note("the kernel of a convolution in {} is computed; no node makes it", where)
            x = self.elementwise("conv", [x, p], [], shape, where)
            if isinstance(x, (Constant, Parameter)):
                return x
            return dataclasses.replace(x, axes=spatial_axes(numbers.out_spec, shape))
        x = self.activation(x)
        out, in_, *space = numbers.rhs_spec
        axes = {"o": [out], "i": [in_], **dict(zip(("h", "w"), ([s] for s in space), strict=False))}
        if len(space) == 1:
            axes = {"o": [out], "i": [in_], "h": [], "w": space}
        # Kernels side by side, as `vmap` stacks them, have an axis more.
        stacked = [n for _, n in p.axes[out] if n > 1][:-1] if len(p.axes) < self.rank(p) else []
        lanes = stacked[0] if len(stacked) == 1 and p.axes[out][0][1] > 1 else 1
        primitive = "conv"
        if params["feature_group_count"] > lanes:
            primitive = "dil_conv" if min(params["rhs_dilation"]) > 1 else "sep_conv"
        if max(params["lhs_dilation"]) > 1:
            module = _module(where, self.names[p.leaf])
            self.note("the transposed convolution in {} is taken for a convolution", module)
        if len(space) > 2:
            self.leave(p, f"a kernel of {len(space)} dimensions; decoded are up to 2")
            p = dataclasses.replace(p, changed="a convolution of more than 2 dimensions")
        row = self.weights(p, out, lanes, primitive, x.row, axes, where)
        found = list(spatial_axes(numbers.out_spec, shape))
        if lanes > 1:
            channels = numbers.out_spec[1]
            found[channels] = ((LANE, lanes), (CHANNEL, shape[channels] // lanes))
        return Activation(row, tuple(found), fresh=True)

    def rank(self, p: Parameter) -> int:
        """Axes of a parameter, without those of a stack that it is taken from."""
        return len(self.shapes[p.leaf]) - len(p.part)

    def weights(self, p: Parameter, axis: int, lanes: int, *row) -> int:
        """As `weight`, of the kernels of layers side by side: the row that stands for them all.

        Args:
          p: their parameter.
          axis: of it, along which they are stacked, before what else lies there.
          lanes: how many there are.
          *row: see `weight`.
        """
        primitive, source, axes, where = row
        if lanes == 1:
            return self.weight(p, *row)
        shape = self.shapes[p.leaf]
        layers = [p.at(axis, i, shape, atoms=1) for i in range(lanes)]
        sources = self.flow.lanes_of(source, lanes)
        return self.flow.abreast(
            [
                self.weight(layer, primitive, s, axes, where)
                for layer, s in zip(layers, sources, strict=True)
            ]
        )

    def product(self, params, a: Value, b: Value, shape, where: str) -> Value:
        """dot_general: a dense layer, attention, or with a constant."""
        (contract, batch) = params["dimension_numbers"]
        axes = product_axes(a, b, contract, batch, shape)
        data = [x for x in (a, b) if isinstance(x, (Activation, Statistic))]
        parameters = [x for x in (a, b) if isinstance(x, Parameter)]
        side = 0 if a in data else 1
        # A kernel is the same for all images: what has the batch's axis as well is a learned query.
        query = parameters and data and BATCH in labels_of([data[0].axes[i] for i in batch[side]])
        if len(data) == 2 or query:
            for p in parameters:
                self.leave(p, f"multiplied image by image {_at(where)}, as learned queries are")
            return Activation(self._attention([self.activation(x).row for x in data]), axes)
        if data and parameters and side:
            swapped = self._dense(b, a, contract[::-1], batch[::-1], where)
            row, batch_axes, x_free, p_free = swapped
            return Activation(row, (*batch_axes, *p_free, *x_free), fresh=True)
        if data and parameters:
            row, batch_axes, x_free, p_free = self._dense(a, b, contract, batch, where)
            return Activation(row, (*batch_axes, *x_free, *p_free), fresh=True)
        if data:
            return dataclasses.replace(data[0], axes=axes)
        of = "dot_general" if len(parameters) == 2 else "a linear map, such as a resize,"
        mixed = self.elementwise(of, [a, b], [], shape, where)
        return dataclasses.replace(mixed, axes=axes)

    def _dense(self, x: Value, p: Parameter, contract, batch, where: str):
        x = self.activation(x)
        free = [i for i in range(len(p.axes)) if i not in (*contract[1], *batch[1])]
        sizes = [math.prod(n for _, n in p.axes[i]) for i in batch[1]]
        lanes = max(sizes, default=1)
        axis = batch[1][sizes.index(lanes)] if lanes > 1 else 0
        x_batch = [x.axes[i] for i in batch[0]]
        if math.prod(sizes) == lanes and (lanes == 1 or len(p.axes[axis]) == 1):
            axes = {"o": free, "i": list(contract[1])}
            row = self.weights(p, axis, lanes, "conv", x.row, axes, where)
            x_batch = [((LANE, n),) if n > 1 else x_batch[i] for i, n in enumerate(sizes)]
        else:
            axes = {"o": [*batch[1], *free], "i": list(contract[1])}
            row = self.weight(p, "conv", x.row, axes, where)
        used = {*contract[0], *batch[0]}
        x_free = [axis for i, axis in enumerate(x.axes) if i not in used]
        p_free = [tuple((CHANNEL, n) for _, n in p.axes[i]) for i in free]
        return row, x_batch, x_free, p_free

    def _attention(self, rows: list[int]) -> int:
        """The row of a product of activations: `msa` where some of them are scores."""
        for scores in rows:
            if self.flow.rows[scores].primitive == SCORES:
                values = [row for row in rows if row != scores]
                return self.flow.add("msa", [*self.flow.rows[scores].sources, *values])
        return self.flow.add(SCORES, rows)

    def window(self, eqn, x: Value, shape, where: str) -> Value:
        """Pooling."""
        params = eqn.params
        size = params["window_dimensions"]
        if isinstance(x, Parameter):
            return dataclasses.replace(x, axes=resize(x.axes, shape), changed="pooling")
        space = [i for i, axis in enumerate(x.axes) if any(label == SPACE for label, _ in axis)]
        space = space or list(range(1, len(size) - 1))
        if max(size) == 1 and shape == tuple(v.aval.shape for v in eqn.invars[:1])[0]:
            return x
        name = eqn.primitive.name.removeprefix("reduce_window")
        if not name:  # any function; its jaxpr is one operation
            name = "_max" if "max" in str(params["jaxpr"]) else "_sum"
        before = eqn.invars[0].aval.shape
        if name == "_sum" and all(size[i] >= before[i] for i in space):
            scope = Scope(frozenset(SPACE), labels_of(x.axes) - {SPACE})
            return Statistic(self.activation(x).row, resize(x.axes, shape), scope)
        if name not in ("_max", "_sum"):
            self.note(f"{eqn.primitive.name} in {{}} is taken for max pooling", where)
        kernel = [1, *(size[i] for i in space)][-2:]
        source = self.activation(x).row
        primitive = "avg_pool" if name == "_sum" else "max_pool"
        row = self.flow.add(primitive, [source], shape=(1, 1, *kernel))
        return Activation(row, resize(x.axes, shape))

    def reduce(self, name: str, x: Value, axes: Sequence[int], where: str) -> Value:
        """Sums, maxima, ... over axes."""
        kept = tuple(axis for i, axis in enumerate(x.axes) if i not in axes)
        if isinstance(x, Parameter):
            return dataclasses.replace(x, axes=kept)
        gone = tuple(axis for i, axis in enumerate(x.axes) if i in axes)
        reduced = labels_of(gone) | {label for a in gone for label, _ in a if label == SPACE}
        other = "" if name == "reduce_sum" else f"{name} {_at(where)}"
        if isinstance(x, Statistic):
            reduced |= x.scope.reduced
            other = other or x.other
        return Statistic(x.row, kept, Scope(frozenset(reduced), labels_of(kept)), other)

    def concatenate(self, operands, axis: int, stacked: bool, shape, where: str) -> Value:
        """Concatenation, or stacking along a new axis."""
        live = [x for x in operands if not isinstance(x, Constant)]
        parameters = [x for x in live if isinstance(x, Parameter)]
        data = [x for x in live if not isinstance(x, Parameter)]
        axes = live[-1].axes
        if stacked:
            axes = (*axes[:axis], ((UNKNOWN, 1),), *axes[axis:])
        axes = resize(axes, shape)
        other = next((x.other for x in data if isinstance(x, Statistic) and x.other), "")
        if not data:
            first = self.elementwise("concatenate", parameters, [], shape, where)
            return dataclasses.replace(first, changed="concatenate", axes=axes)
        for p in parameters:
            self.leave(p, f"concatenated to activations {_at(where)}, as class tokens are")
        if all(isinstance(x, Statistic) for x in data) and len({x.row for x in data}) == 1:
            if stacked:  # of windows: adaptive pooling
                group = ((SPACE, shape[axis]),)
                axes = (*axes[:axis], group, *axes[axis + 1 :])
            scope = functools.reduce(Scope.__or__, [x.scope for x in data])
            return Statistic(data[0].row, axes, Scope(scope.reduced, labels_of(axes)), other)
        rows = [self.activation(x).row for x in data]
        if len(rows) == 1:
            return dataclasses.replace(self.activation(data[0]), axes=axes)
        return Activation(self.flow.join("concat", rows), axes)

    # --- Functions of single elements ---

    def view(self, eqn, x: Value, others: Sequence[Constant], output: int, shape) -> Value:
        """A value laid out otherwise.

        Args:
          eqn: the equation.
          x: its first operand.
          others: its other ones.
          output: which of its outputs.
          shape: of that.
        """
        name, params = eqn.primitive.name, eqn.params
        if isinstance(x, Parameter):
            for axis, index in _picked(eqn, others, output, shape):
                x = x.at(axis, index, self.shapes[x.leaf])
        axes = x.axes
        if name == "reshape":
            order = params["dimensions"] or range(len(axes))  # it may transpose first
            axes = regroup([axes[i] for i in order], shape)
        elif name == "transpose":
            axes = tuple(axes[i] for i in params["permutation"])
        elif name == "squeeze":
            gone = {d % len(axes) for d in params["dimensions"]}
            axes = tuple(axis for i, axis in enumerate(axes) if i not in gone)
        elif name == "unstack":
            axes = tuple(axis for i, axis in enumerate(axes) if i != params["axis"])
        elif name == "tile":  # what had size 1 does not vary along the axis, as if broadcast
            sizes = zip(axes, eqn.invars[0].aval.shape, shape, strict=True)
            axes = resize([() if n == 1 < size else axis for axis, n, size in sizes], shape)
        elif name == "broadcast_in_dim":
            before = eqn.invars[0].aval.shape
            at = dict(zip(params["broadcast_dimensions"], range(len(axes)), strict=True))
            axes = tuple(
                axes[at[i]] if i in at and before[at[i]] == size else ()
                for i, size in enumerate(shape)
            )
        elif name == "gather":
            axes = looked_up_axes(axes, params["dimension_numbers"], params["slice_sizes"], shape)
        elif len(axes) == len(shape):
            axes = resize(axes, shape)
        else:
            axes = unknown_axes(shape)
        return dataclasses.replace(x, axes=axes)

    def elementwise(self, name: str, operands, literals, shape, where: str) -> Value:
        """A function of each element; operands broadcast."""
        parameters = [x for x in operands if isinstance(x, Parameter)]
        data = [x for x in operands if isinstance(x, (Activation, Statistic))]
        state = any(isinstance(x, Constant) and x.state for x in operands)
        if not data:
            return self._parameters(name, operands, parameters, literals, shape, state)
        if len({x.row for x in data}) > 1:
            data = [self.activation(x) for x in data]
        axes = merge([x.axes for x in data], shape)
        if len(data) > 1:
            value = self._several(name, data, axes, where)
        elif parameters:
            value = dataclasses.replace(data[0], axes=axes)
        else:
            value = self._one(name, data[0], axes, state)
        for p in parameters:
            value = self._with_parameter(name, value, p, axes, shape, where)
        return value

    def _parameters(self, name, operands, parameters, literals, shape, state) -> Value:
        """A function of parameters and constants alone."""
        size = [math.prod(self.shape_of(p.key)) for p in parameters]
        main = parameters[int(np.argmax(size))]
        others = {key for p in parameters for key in (p.key, *p.others)} - {main.key}
        scopes = [p.scope for p in parameters if p.scope] + ([RUNNING] if state else [])
        scope = functools.reduce(Scope.__or__, scopes) if scopes else None
        keeps = {"mul", "div", "select_n", "sub", "add", "add_any"} | _VIEWS
        zero = any(v is not None and np.ndim(v) == 0 and v == 0 for v in literals)
        shifted = name in ("add", "sub") and len(parameters) < len(operands) and not zero
        changed = main.changed or ("" if name in keeps and not shifted else name)
        axes = [p.axes for p in parameters if p.key == main.key]
        full = [a for a in axes if len(a) == len(shape)]
        axes = merge(full, shape) if full else unknown_axes(shape)
        by = len(parameters) > 1 or state  # by its own deviation or norm, a gain, a singular value
        rescaled = main.rescaled or (name in ("mul", "div") and by)
        return Parameter(main.leaf, axes, main.part, frozenset(others), scope, changed, rescaled)

    def _one(self, name: str, x: Activation | Statistic, axes: Axes, state: bool) -> Value:
        """A function of one value and constants."""
        if isinstance(x, Statistic):
            if state and name in ("mul", "div"):  # batch norm of pooled features
                return dataclasses.replace(self.activation(x), axes=axes, scope=RUNNING)
            return dataclasses.replace(x, axes=axes)
        linear = name in _SAME | {"mul", "div", "add", "sub", "neg"}
        scope = RUNNING if state and name in ("mul", "div") else x.scope if linear else None
        return dataclasses.replace(x, axes=axes, scope=scope, fresh=x.fresh and name in _SAME)

    def _several(self, name: str, data, axes: Axes, where: str) -> Value:
        """A function of several values."""
        rows = [x.row for x in data]
        if len(set(rows)) == 1:
            statistics = [x for x in data if isinstance(x, Statistic)]
            whole = [x for x in data if isinstance(x, Activation)]
            scale = name in ("mul", "div")
            if not whole:
                scope = functools.reduce(Scope.__or__, [x.scope for x in statistics])
                least = min(statistics, key=lambda x: len(x.scope.reduced))
                if least.scope.reduced < scope.reduced:  # a norm of pooled features
                    if not scale:
                        return Statistic(rows[0], axes, least.scope)
                    most = max(statistics, key=lambda x: len(x.scope.reduced))
                    row = self.activation(least).row
                    return Activation(row, axes, most.scope.beyond(least.scope))
                return Statistic(rows[0], axes, Scope(scope.reduced, labels_of(axes)))
            if statistics:
                scope = statistics[0].scope if scale else None
                return Activation(rows[0], axes, scope)
            if name in ("add", "add_any"):
                return Activation(self.flow.add("sum", rows), axes)
            return Activation(rows[0], axes)
        if name in ("add", "add_any", "sub"):
            return Activation(self.flow.add("sum", rows), axes)
        origins = {self.flow.origin(row) for row in rows}
        if len(origins) == 1:
            return Activation(origins.pop(), axes)
        if name == "mul":
            for x, gate in (rows, rows[::-1]):
                means = self.flow.squeezed(gate, x)
                if means:
                    for mean in means:
                        self.flow.rows[mean].primitive = THROUGH
                    return Activation(self.flow.add("cse", [x, gate]), axes)
        if name in _ELEMENTWISE:
            self.note(
                f"{name} of activations in {{}} is no primitive; edges pass through it", where
            )
        return Activation(self.flow.add(THROUGH, rows), axes)

    # --- Parameters met by activations ---

    def _with_parameter(self, name, x: Value, p: Parameter, axes, shape, where) -> Value:
        """A function of an activation and a parameter."""
        axes = merge([axes, p.axes], shape) if len(p.axes) == len(shape) else axes
        if isinstance(x, Statistic):
            if name in ("mul", "div") and p.scope in (None, x.scope):
                # The factor of a norm on its way: its weight times the inverse deviation.
                p_axes = merge([p.axes], shape) if len(p.axes) == len(shape) else p.axes
                return dataclasses.replace(p, axes=p_axes, scope=x.scope)
            if p.scope is not None:  # the norm of pooled features
                p = dataclasses.replace(p, scope=p.scope.beyond(x.scope))
            x = self.activation(x)
        if name in ("add", "sub", "add_any"):
            return self._abreast(self._shift, x, p, axes, where)
        if name in ("mul", "div"):
            return self._abreast(self._scale, x, p, axes, where)
        self.leave(p, f"{name} of activations and it {_at(where)} is no primitive")
        return Activation(x.row, axes)

    def _abreast(self, function, x: Activation, p: Parameter, axes, where: str) -> Activation:
        """Applies a function to each of layers side by side, or to the one that there is."""
        lanes = [
            i
            for i, (mine, its) in enumerate(zip(p.axes, axes, strict=False))
            if len(p.axes) == len(axes) == len(x.axes)
            and mine and mine[0][1] > 1 and its and its[0] == (LANE, mine[0][1])
        ]  # fmt: skip
        if len(lanes) != 1:
            return function(x, p, axes, where)
        (at,) = lanes
        count = axes[at][0][1]
        shape = self.shapes[p.leaf]
        one = (*axes[:at], axes[at][1:], *axes[at + 1 :])
        found = [
            function(
                dataclasses.replace(x, row=row, axes=one), p.at(at, i, shape, atoms=1), one, where
            )
            for i, row in enumerate(self.flow.lanes_of(x.row, count))
        ]
        return Activation(self.flow.abreast([y.row for y in found]), axes, fresh=found[0].fresh)

    def _along(self, x: Activation, p: Parameter) -> dict[Any, str]:
        """Axis of the parameter -> label of the activation's axis that it varies along."""
        if self.rank(p) == math.prod(self.shape_of(p.key)) == 1:  # of a layer with a single
            channels = [n for axis in x.axes for label, n in axis if label == CHANNEL]  # channel,
            (only,) = {*range(len(self.shapes[p.leaf]))} - {axis for axis, _ in p.part}
            return {only: CHANNEL} if channels and max(channels) == 1 else {}  # or a number
        found = {}
        for mine, its in zip(p.axes, x.axes, strict=True):
            labels = {label for label, _ in its} or {UNKNOWN}
            for axis, n in mine:
                if n > 1:
                    found[axis] = (
                        SPACE if labels == {SPACE} else BATCH if labels == {BATCH} else CHANNEL
                    )
        return found

    def _shift(self, x: Activation, p: Parameter, axes: Axes, where: str) -> Value:
        """A parameter added: a norm's or a layer's bias, or an encoding of positions."""
        row = self.flow.rows[x.row]
        along = self._along(x, p) if len(p.axes) == len(x.axes) else {}
        if row.primitive in ("bn", "ln") and x.fresh and row.bias is None:
            mine = {p.key, *p.others} - {row.weight}
            if len(mine) == 1:
                (key,) = mine
                row.bias = key
                shape = self.shape_of(key)
                whole = {axis: "o" for axis in range(len(shape))}
                changed = p.changed if key == p.key else ""
                if math.prod(shape) == math.prod(row.shape):
                    bias = Parameter(key[0], (), key[1], changed=changed)
                    self.place(bias, x.row, "bias", whole)
                    return Activation(x.row, axes)
        if row.primitive == SCORES:
            self.leave(p, f"added to attention's scores {_at(where)}")
            return Activation(x.row, axes)
        labels = set(along.values())
        if not along or BATCH in labels:
            self.leave(p, f"{'a number' if not along else 'no bias'} added {_at(where)}")
            return Activation(x.row, axes)
        if labels == {CHANNEL}:
            size = math.prod(self.shape_of(p.key))
            at = self.flow.add(
                "bias", [x.row], shape=(size,), name=self.name_of(p.key), weight=p.key
            )
            self.place(p, at, "bias", dict.fromkeys(along, "o"))
            return Activation(at, axes)
        return Activation(self._position(x, p, along, where), axes)

    def _position(self, x: Activation, p: Parameter, along: dict, where: str) -> int:
        """Adds `pos_enc` and `sum`."""
        shape = self.shape_of(p.key)
        space = [axis for axis in sorted(along) if along[axis] == SPACE]
        channels = math.prod(shape[axis] for axis in along if along[axis] == CHANNEL)
        grid = [i for i, axis in enumerate(x.axes) if {label for label, _ in axis} == {SPACE}]
        height, *rest = [math.prod(n for _, n in p.axes[i]) for i in grid]
        width, skip = math.prod(rest), 0
        positions = math.prod(shape[axis] for axis in space)
        if positions != height * width and not p.changed:
            how = f"a resize from {positions} to {height * width} positions"
            p = dataclasses.replace(p, changed=how)
        if len(grid) == 1:  # tokens: a square grid, perhaps after class tokens
            height = width = math.isqrt(positions)
            skip = positions - height * width
        at = self.flow.add(
            "pos_enc",
            [],
            shape=(1, channels, height, width),
            name=self.name_of(p.key),
            weight=p.key,
        )
        if skip > 1:
            self.leave(p, f"{positions} positions {_at(where)} are no square grid")
        else:
            roles = {axis: "s" if label == SPACE else "c" for axis, label in along.items()}
            self.place(p, at, "embedding", roles, skip)
        return self.flow.add("sum", [x.row, at])

    def _scale(self, x: Activation, p: Parameter, axes: Axes, where: str) -> Value:
        """A parameter multiplied with: a norm's weight, or none of the primitives."""
        scope = p.scope or x.scope
        along = self._along(x, p) if len(p.axes) == len(x.axes) else {}
        if scope is None or not along or set(along.values()) != {CHANNEL}:
            what = "a number" if not along else "a scale without a norm"
            if scope is not None and along:
                what = "a norm's weight that varies with position"
            self.leave(p, f"{what} {_at(where)}: no primitive")
            return Activation(x.row, axes)
        primitive = self._norm(scope, _module(where, self.names[p.leaf]))
        size = math.prod(self.shape_of(p.key))
        row = self.flow.add(
            primitive, [x.row], shape=(size,), name=self.name_of(p.key), weight=p.key
        )
        self.place(p, row, "scale", dict.fromkeys(along, "o"))
        return Activation(row, axes, fresh=True)

    def _norm(self, scope: Scope, where: str) -> str:
        """The primitive of a norm with this statistic."""
        if BATCH in scope.reduced:
            return "bn"
        if SPACE in scope.reduced and scope.kept & {CHANNEL}:
            self.note("the group or instance norm in {} is taken for batch norm (bn)", where)
            return "bn"
        if SPACE in scope.reduced or CHANNEL in scope.kept:
            self.note("the norm in {} is taken for layer norm (ln)", where)
        return "ln"


def _picked(eqn, others: Sequence[Constant], output: int, shape):
    """(axis, index) where a view has one of what lies along an axis; index None: not known."""
    name, params = eqn.primitive.name, eqn.params
    before = eqn.invars[0].aval.shape
    if name == "unstack":
        yield params["axis"], output
    elif name == "gather":
        (axis,) = gone = params["dimension_numbers"].collapsed_slice_dims or (None,)
        if len(gone) == 1 and axis is not None and math.prod(eqn.invars[1].aval.shape) == 1:
            value = others[0].value
            yield axis, None if value is None else int(np.clip(value.item(), 0, before[axis] - 1))
    elif name in ("slice", "dynamic_slice", "split"):
        for axis, size in enumerate(shape):
            if size > 1 or before[axis] == 1:
                continue
            start: Any = output
            if name == "slice":
                start = params["start_indices"][axis]
            elif name == "dynamic_slice":
                value = others[axis].value
                start = None if value is None else int(np.clip(value, 0, before[axis] - 1))
            yield axis, start


def _module(where: str, parameter: str) -> str:
    """Where an equation is; NNX modules do not say so, but the names of their parameters do."""
    return where or parameter.rpartition("/")[0]


def _at(where: str) -> str:
    return f"in {where}" if where else "in the model"


# --- What the rest of the package calls -----------------------------------------------------------


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


def read_init(
    init: Callable, key
) -> tuple[Any, Callable[[Sequence[int]], list[jax.Array]], Callable[[int], float | None]]:
    """Traces a model's initialisation.

    Args:
      init: key -> variables.
      key: a random key.

    Returns:
      The variables as shapes; a function that computes some of their leaves, given by their places
      in `jax.tree.leaves`, and nothing that they do not depend on; and one that tells of a leaf the
      number that it is filled with, None where it is filled with several.
    """
    closed, shapes = jax.make_jaxpr(init, return_shape=True)(key)

    def constant(number: int) -> float | None:
        return _constant(closed.jaxpr, closed.jaxpr.outvars[number], {})

    def filled(number: int) -> jax.Array | None:
        """Zeros, ones, ... without compiling a program for each shape of them."""
        value, aval = constant(number), closed.jaxpr.outvars[number].aval
        return None if value is None else jax.numpy.asarray(np.full(aval.shape, value, aval.dtype))

    def compute(wanted: Sequence[int]) -> list[jax.Array]:
        found = {number: filled(number) for number in wanted}
        rest = sorted(number for number in found if found[number] is None)
        if rest:
            used = [i in rest for i in range(len(closed.jaxpr.outvars))]
            jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
            values = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))(key)
            found.update(zip(rest, values, strict=True))
        return [found[number] for number in wanted]

    return shapes, compute, constant


_LAID_OUT = {
    "broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose",
}  # fmt: skip
_COMBINED = {"mul": np.multiply, "add": np.add, "sub": np.subtract, "div": np.divide}


def _scan_sizes(eqn) -> tuple[int, int]:
    """How many inputs of a scan are the same in all turns, and how many go from turn to turn.

    By their shapes, as versions of JAX say it in different parameters: what is stacked has an axis
    more outside.
    """
    inner = eqn.params["jaxpr"].jaxpr

    def stacked(outside, inside) -> int:
        return sum(a.aval.shape != b.aval.shape for a, b in zip(outside, inside, strict=True))

    carried = len(eqn.outvars) - stacked(eqn.outvars, inner.outvars)
    return len(eqn.invars) - carried - stacked(eqn.invars, inner.invars), carried


def _constant(jaxpr, atom, known: Mapping) -> float | None:
    """The number that all elements of a value are, whatever the inputs; None where they vary."""
    if isinstance(atom, core.Literal):
        return float(atom.val) if np.ndim(atom.val) == 0 else None
    if atom in known:
        return known[atom]
    eqn = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
    if eqn is None:
        return None
    name, inner = eqn.primitive.name, _inner(eqn)
    if name in _LAID_OUT:
        return _constant(jaxpr, eqn.invars[0], known)
    if name in _COMBINED:
        values = [_constant(jaxpr, v, known) for v in eqn.invars]
        return None if None in values else float(_COMBINED[name](*values))
    if inner is None:
        return None
    inputs = {}
    if name != "scan":
        pairs = zip(inner.jaxpr.invars, eqn.invars, strict=False)
        inputs = {v: _constant(jaxpr, outer, known) for v, outer in pairs}
    elif eqn.outvars.index(atom) < _scan_sizes(eqn)[1]:
        return None
    return _constant(inner.jaxpr, inner.jaxpr.outvars[eqn.outvars.index(atom)], inputs)
