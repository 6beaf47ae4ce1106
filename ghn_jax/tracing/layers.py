"""Convolutions, dense layers, attention, pooling, concatenation, and values laid out otherwise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from ghn_jax.tracing.abstract_values import (
    BATCH,
    CHANNEL,
    LANE,
    SPACE,
    UNKNOWN,
    Activation,
    Constant,
    Parameter,
    Scope,
    Statistic,
    Value,
    labels_of,
    looked_up_axes,
    product_axes,
    regroup_repeated,
    resize,
    spatial_axes,
    unknown_axes,
)
from ghn_jax.tracing.elementwise import Elementwise
from ghn_jax.tracing.equations import picked
from ghn_jax.tracing.findings import module_of, said_of
from ghn_jax.tracing.flow import SCORES


class Layers(Elementwise):
    """What functions of several elements are in the paper's primitives."""

    def convolution(self, params, x: Value, p: Value, shape, where: str) -> Value:
        """conv_general_dilated."""
        numbers = params["dimension_numbers"]
        if isinstance(x, (Constant, Parameter)) or not isinstance(p, Parameter):
            if not isinstance(p, Constant):
                self.note("the kernel of a convolution in {} is computed; no node makes it", where)
            self._multiplied(x, p)
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
            module = module_of(where, self.names[p.leaf])
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
                self.leave(p, f"multiplied image by image {said_of(where)}, as learned queries are")
            return Activation(self._attention([self.activation(x).row for x in data], where), axes)
        if data and parameters and side:
            swapped = self._dense(b, a, contract[::-1], batch[::-1], where)
            row, batch_axes, x_free, p_free = swapped
            return Activation(row, (*batch_axes, *p_free, *x_free), fresh=True)
        if data and parameters:
            row, batch_axes, x_free, p_free = self._dense(a, b, contract, batch, where)
            return Activation(row, (*batch_axes, *x_free, *p_free), fresh=True)
        if data:
            return dataclasses.replace(data[0], axes=axes)
        self._multiplied(a, b)
        of = "dot_general" if len(parameters) == 2 else "a linear map, such as a resize,"
        mixed = self.elementwise(of, [a, b], [], shape, where)
        return dataclasses.replace(mixed, axes=axes)

    def _multiplied(self, a: Value, b: Value) -> None:
        """Of two parameters, as of a kernel and a token, either may be the larger: both are noted.

        No kernel is taken for a bias, so that it does no harm.
        """
        if isinstance(a, Parameter) and isinstance(b, Parameter):
            self.tokens |= {a.leaf, b.leaf}

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

    def _attention(self, rows: list[int], where: str) -> int:
        """The row of a product of activations: `msa` where some of them are scores."""
        scores = {row: self.flow.scores(row) for row in rows}
        direct = [row for row in rows if scores[row] == row]
        found = direct or [row for row in rows if scores[row] is not None]
        if not direct and len(found) != 1:  # of queries and keys, both may be made of products
            row = self.flow.add(SCORES, rows)
            self.products[row] = where
            return row
        self.products.pop(scores[found[0]], None)
        read = self.flow.rows[found[0]].sources if direct else found
        return self.flow.add("msa", [*read, *(row for row in rows if row != found[0])])

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
        if name == "_sum" and all(size[i] >= before[i] and shape[i] == 1 for i in space):
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
        other = "" if name == "reduce_sum" else f"{name} {said_of(where)}"
        if isinstance(x, Statistic):
            reduced |= x.scope.reduced
            other = other or x.other
        return Statistic(x.row, kept, Scope(frozenset(reduced), labels_of(kept)), other)

    def concatenate(self, operands, axis: int, stacked: bool, shape, where: str) -> Value:
        """Concatenation, or stacking along a new axis."""
        live = [x for x in operands if not isinstance(x, Constant)]
        parameters = [x for x in live if isinstance(x, Parameter)]
        data = [x for x in live if not isinstance(x, Parameter)]
        axes = (data or live)[-1].axes  # a token's own axes say nothing of what it joins
        if stacked:
            axes = (*axes[:axis], ((UNKNOWN, 1),), *axes[axis:])
        axes = resize(axes, shape)
        other = next((x.other for x in data if isinstance(x, Statistic) and x.other), "")
        if not data:
            first = self.elementwise("concatenate", parameters, [], shape, where)
            return dataclasses.replace(first, changed="concatenate", axes=axes)
        for p in parameters:
            self.tokens.add(p.leaf)
            self.leave(p, f"concatenated to activations {said_of(where)}, as class tokens are")
        if all(isinstance(x, Statistic) for x in data) and len({x.row for x in data}) == 1:
            if stacked:  # of windows: adaptive pooling
                group = ((SPACE, shape[axis]),)
                axes = (*axes[:axis], group, *axes[axis + 1 :])
            scope = functools.reduce(Scope.__or__, [x.scope for x in data])
            return Statistic(data[0].row, axes, Scope(scope.reduced, labels_of(axes)), other)
        rows = [self.activation(x).row for x in data]
        if len(rows) == 1:
            return dataclasses.replace(self.activation(data[0]), axes=axes)
        origins = {self.flow.origin(row) for row in rows}
        if len(origins) == 1:  # parts of one value, such as the halves that RoPE turns
            return Activation(origins.pop(), axes)
        return Activation(self.flow.join("concat", rows), axes)

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
            for axis, index in picked(eqn, others, output, shape):
                x = x.at(axis, index, self.shapes[x.leaf])
        axes = x.axes
        if name == "reshape":
            order = params["dimensions"] or range(len(axes))  # it may transpose first
            before = eqn.invars[0].aval.shape
            sizes = [before[i] for i in order] if len(axes) == len(before) else [1] * len(axes)
            axes = regroup_repeated([axes[i] for i in order], sizes, shape)
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
