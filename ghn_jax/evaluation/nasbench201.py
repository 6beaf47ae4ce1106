"""NAS-Bench-201 (Dong & Yang 2020): 15,625 networks that have been trained, and their table.

    table = read("nasbench201.npz")
    cells = [parse_cell(text) for text in table.cells]
    graph, network = cell_graph(cells[0], 50), NASBench201(cells[0])

A cell has four states, the first its input and the last its output, and an operation on each of
the six edges between them. All networks have the same skeleton around fifteen such cells. Many
cells are the same network (isomorphic, or with edges that lead nowhere): they are kept, as they
were trained one by one and differ by the noise of training.
"""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.deepnets1m.wiring import DisconnectedError
from ghn_jax.hypernet.gatedgnn import linear_init
from ghn_jax.tracing.flow import Flow

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
# (from, to) of a cell's edges, in the order of a cell string.
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
_KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}

Cell = tuple[str, ...]  # the operation of each edge


# --- The table ------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Measured accuracies.

    Attributes:
      cells: (N,) cell strings.
      accuracy: column ('cifar10-val', 'cifar10-test', ...) -> (N,) per cent.
    """

    cells: np.ndarray
    accuracy: dict[str, np.ndarray]


def read(path: str | os.PathLike) -> Table:
    """Reads a table: a .npz with `cell` (N,), `columns` (K,) and `accuracy` (N, K).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is something else, or holds numbers that are no percentage.
    """
    path, names = Path(path), ("cell", "columns", "accuracy")
    with path.open("rb") as stream:
        try:
            file = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no .npz file: {error}") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{path} is a single array; expected a .npz file with several")
        missing = sorted({*names} - {*file.files})
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; found: {file.files}")
        try:
            cells, columns, accuracy = (file[name] for name in names)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if accuracy.shape != (*cells.shape, *columns.shape) or accuracy.ndim != 2:
        raise ValueError(
            f"{path}: accuracy has shape {accuracy.shape}, cell {cells.shape} and columns "
            f"{columns.shape}; expected (N, K), (N,) and (K,)"
        )
    if accuracy.dtype.kind != "f" or not ((accuracy >= 0) & (accuracy <= 100)).all():
        raise ValueError(f"{path}: accuracy has values that are no percentages from 0 to 100")
    rows = accuracy.T.astype(np.float64)
    return Table(cells.astype("U"), dict(zip(columns.astype("U").tolist(), rows, strict=True)))


def parse_cell(text: str) -> Cell:
    """The operations of '|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|'.

    Raises:
      ValueError: the text is no such cell.
    """
    edges = [
        edge.partition("~") for state in text.split("+") for edge in state.strip("|").split("|")
    ]
    cell = tuple(name for name, _, _ in edges)
    if len(cell) != len(EDGES) or format_cell(cell) != text:
        raise ValueError(
            f"{text!r} is no cell; expected '|a~0|+|b~0|c~1|+|d~0|e~1|f~2|' with operations of "
            f"{', '.join(OPERATIONS)}"
        )
    for name in cell:
        if name not in OPERATIONS:
            raise ValueError(f"{name!r} in {text!r}; allowed: {', '.join(OPERATIONS)}")
    return cell


def format_cell(cell: Cell) -> str:
    """The cell string of the operations of the six edges."""
    a, b, c, d, e, f = cell
    return f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"


def is_connected(cell: Cell) -> bool:
    """Whether a path leads from a cell's input to its output: else all logits are the same."""
    reached = {0}
    for (from_, to), kind in zip(EDGES, cell, strict=True):
        if kind != "none" and from_ in reached:
            reached.add(to)
    return 3 in reached


# --- The network ----------------------------------------------------------------------------------


def _walk_cell(cell: Cell, x, apply: Callable, add: Callable):
    """The last state of a cell, None for zero.

    What no edge leads to is zero, and so is what is made from it. (Batch norm's bias makes a
    constant of it in the authors' networks; that depends on no image.)

    Args:
      cell: the operations.
      x: the first state.
      apply: (operation, its edge's number, a state) -> what it adds to another.
      add: the sum of two.
    """
    states = [x, None, None, None]
    for i, ((from_, to), kind) in enumerate(zip(EDGES, cell, strict=True)):
        if kind != "none" and states[from_] is not None:
            y = apply(kind, i, states[from_])
            states[to] = y if states[to] is None else add(states[to], y)
    return states[-1]


class _ReLUConvBN(nn.Module):
    """A ReLU, a convolution without bias and batch norm.

    Attributes:
      channels: of the output.
      kernel: height and width of the kernel.
      stride: of the convolution.
    """

    channels: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        x = _conv(self.channels, self.kernel, self.stride, name="conv")(nn.relu(x))
        return _norm(train, "bn")(x)


def _conv(channels: int, kernel: int, stride: int = 1, *, name: str) -> nn.Conv:
    return nn.Conv(
        channels,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=linear_init,
        name=name,
    )


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)


class NASBench201(nn.Module):
    """A network of the benchmark.

    Attributes:
      cell: the operations.
      num_classes: number of classes.
      C: channels of the first cells; twice and four times as many in the next two stages.
      N: cells in each of the three stages.
    """

    cell: Cell
    num_classes: int = 10
    C: int = 16
    N: int = 5

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on batch statistics.

        Raises:
          DisconnectedError: no path leads through the cell.
        """
        _check_connected(self.cell)

        def operation(kind: str, name: str, x: jax.Array) -> jax.Array:
            if kind == "skip_connect":
                return x
            if kind == "avg_pool_3x3":
                return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)
            return _ReLUConvBN(x.shape[-1], _KERNELS[kind], name=name)(x, train=train)

        x = _norm(train, "stem_bn")(_conv(self.C, 3, name="stem_conv")(images))
        for stage in range(3):
            if stage:
                channels, at = self.C * 2**stage, f"reduction_{stage}"
                y = _ReLUConvBN(channels, 3, 2, name=f"{at}_a")(x, train=train)
                y = _ReLUConvBN(channels, 3, name=f"{at}_b")(y, train=train)
                x = _conv(channels, 1, name=f"{at}_shortcut")(nn.avg_pool(x, (2, 2), (2, 2)))
                x = x + y
            for i in range(self.N):
                at = f"cell_{stage * self.N + i}"

                def apply(kind, edge, x, at=at):
                    return operation(kind, f"{at}_{edge}", x)

                x = _walk_cell(self.cell, x, apply, jnp.add)
        x = nn.relu(_norm(train, "last_bn")(x)).mean((1, 2))
        return nn.Dense(self.num_classes, kernel_init=linear_init, name="classifier")(x)


def _check_connected(cell: Cell) -> None:
    if not is_connected(cell):
        raise DisconnectedError(
            f"no path leads from the input to the output of {format_cell(cell)}; leave out cells "
            "that are not connected (is_connected)"
        )


def cell_graph(
    cell: Cell, virtual_edges: int = 50, *, num_classes: int = 10, C: int = 16, N: int = 5
) -> Graph:
    """The graph of a network of the benchmark, as `model_graph` would trace it, names included.

    Args:
      cell, num_classes, C, N: of the network, see `NASBench201`.
      virtual_edges: see `deepnets1m.graph.build_graph`.

    Raises:
      DisconnectedError: no path leads through the cell.
    """
    _check_connected(cell)
    flow = Flow()

    def conv(x: int, name: str, out: int, in_: int, kernel: int) -> int:
        return flow.add("conv", [x], shape=(out, in_, kernel, kernel), name=f"{name}/kernel")

    def bn(x: int, name: str, channels: int) -> int:
        return flow.add("bn", [x], shape=(channels,), name=f"{name}/scale")

    def relu_conv_bn(x: int, name: str, out: int, in_: int, kernel: int) -> int:
        return bn(conv(x, f"{name}/conv", out, in_, kernel), f"{name}/bn", out)

    def add(x: int, y: int) -> int:
        return flow.add("sum", [x, y])

    def pool(x: int, size: int) -> int:
        return flow.add("avg_pool", [x], shape=(1, 1, size, size))

    x = bn(conv(0, "stem_conv", C, 3, 3), "stem_bn", C)
    channels = C
    for stage in range(3):
        if stage:
            before, channels, at = channels, 2 * channels, f"reduction_{stage}"
            y = relu_conv_bn(x, f"{at}_a", channels, before, 3)
            y = relu_conv_bn(y, f"{at}_b", channels, channels, 3)
            x = add(conv(pool(x, 2), f"{at}_shortcut", channels, before, 1), y)
        for i in range(N):
            at = f"cell_{stage * N + i}"

            def apply(kind, edge, x, at=at, c=channels):
                if kind == "skip_connect":
                    return x
                if kind == "avg_pool_3x3":
                    return pool(x, 3)
                return relu_conv_bn(x, f"{at}_{edge}", c, c, _KERNELS[kind])

            x = _walk_cell(cell, x, apply, add)
    x = flow.add("glob_avg", [bn(x, "last_bn", channels)])
    x = flow.add("conv", [x], shape=(num_classes, channels), name="classifier/kernel")
    x = flow.add("bias", [x], shape=(num_classes,), name="classifier/bias")
    return flow.graph(x, virtual_edges, num_classes)[0]


@functools.cache
def _costs(num_classes: int, C: int, N: int) -> tuple[dict[str, tuple[int, int]], tuple[int, int]]:
    """((parameters, multiply-adds) of an operation in all cells, those of everything else)."""
    kinds = {kind: (0, 0) for kind in OPERATIONS}
    stages = [(C * 2**i, 32 // 2**i) for i in range(3)]
    for kind, kernel in _KERNELS.items():
        weights = [kernel**2 * c**2 for c, _ in stages]
        kinds[kind] = (
            N * sum(w + 2 * c for w, (c, _) in zip(weights, stages, strict=True)),
            N * sum(w * size**2 for w, (_, size) in zip(weights, stages, strict=True)),
        )
    parameters, products = 27 * C + 2 * C, 27 * C * 32**2
    for before, (c, size) in zip((C, 2 * C), stages[1:], strict=True):
        weights = 9 * before * c + 9 * c * c + before * c
        parameters += weights + 4 * c
        products += weights * size**2
    last = 4 * C
    parameters += 2 * last + (last + 1) * num_classes
    return kinds, (parameters, products + last * num_classes)


def count_parameters(cell: Cell, *, num_classes: int = 10, C: int = 16, N: int = 5) -> int:
    """Parameters of a network as the benchmark counts them: every edge's, used or not."""
    kinds, rest = _costs(num_classes, C, N)
    return rest[0] + sum(kinds[kind][0] for kind in cell)


def count_flops(cell: Cell, *, num_classes: int = 10, C: int = 16, N: int = 5) -> int:
    """Floating-point operations of a network for an image of 32x32 pixels, every edge's.

    Two for each multiply-add of convolutions and classifier; the benchmark's own numbers are half
    of these.
    """
    kinds, rest = _costs(num_classes, C, N)
    return 2 * (rest[1] + sum(kinds[kind][1] for kind in cell))


# --- Search ---------------------------------------------------------------------------------------
