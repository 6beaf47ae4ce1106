"""A network as the list of steps that the engine takes: its operations' units over values.

Every array that a network computes is a *value*, written by one step. States of the wiring become
values where batch norm and sums are done (`units.NormSum`); what is the identity is no step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from ghn_jax.deepnets1m.operations import Piece, network_pieces
from ghn_jax.deepnets1m.units import Classifier, Identity, NormSum, Unit
from ghn_jax.deepnets1m.wiring import IMAGE, StateInfo, Wiring

Value = int
IMAGES: Value = 0


class Step(NamedTuple):
    """One unit.

    Attributes:
      unit: what it computes.
      names: official names of its parameters.
      inputs: the values that it reads, None for zeros.
      output: the value that it writes.
    """

    unit: Unit
    names: tuple[str, ...]
    inputs: tuple[Value | None, ...]
    output: Value


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the module's docstring.

    Attributes:
      wiring: the architecture's operations.
      steps: in execution order, the classifier last.
      values: channels and height of each value; the logits have height 1.
      states: the value of each state of the wiring.
    """

    wiring: Wiring
    steps: tuple[Step, ...]
    values: tuple[StateInfo, ...]
    states: dict[int, Value]

    @functools.cached_property
    def last_reader(self) -> dict[Value, int]:
        """The last step that reads each value."""
        return {v: i for i, step in enumerate(self.steps) for v in step.inputs if v is not None}


class _Lister:
    def __init__(self, wiring: Wiring, running: bool):
        self.wiring, self.running = wiring, running
        self.steps: list[Step] = []
        self.values = [wiring.states[IMAGE]]
        self.states: dict[int, Value] = {IMAGE: IMAGES}
        # Of each state, what is added up: values, with the name of the batch norm behind or ''.
        self.terms: dict[int, list[tuple[Value, str]]] = {}

    def step(self, unit: Unit, names, inputs, channels: int, size: int) -> Value:
        """Lists a step; returns the value that it writes."""
        self.values.append(StateInfo(channels, size))
        self.steps.append(Step(unit, tuple(names), tuple(inputs), len(self.values) - 1))
        return self.steps[-1].output

    def sum(self, terms: list[tuple[Value, str]]) -> Value:
        """The value that terms add up to, each behind its batch norm."""
        normed = [(v, name) for v, name in terms if name]
        plain = [v for v, name in terms if not name]
        if not normed and len(plain) == 1:
            return plain[0]
        channels, size = self.values[terms[0][0]]
        unit = NormSum(channels, len(normed), self.running and bool(normed))
        inputs = [*(v for v, _ in normed), *plain]
        return self.step(unit, [name for _, name in normed], inputs, channels, size)

    def read(self, state: int) -> Value:
        """A state's value; all that adds to it was listed before."""
        if state not in self.states:
            self.states[state] = self.sum(self.terms[state])
        return self.states[state]

    def operation(self, pieces: tuple[Piece, ...], inputs, output: int) -> None:
        """Lists an operation."""
        last = len(pieces) - 1
        values = [None if s is None else self.read(s) for s in inputs]
        for i, (unit, names, norm) in enumerate(pieces):
            norm = norm if self.wiring.norm else ""
            channels, size = self.values[next(v for v in values if v is not None)]
            if unit == Identity():
                (value,) = values
            else:
                channels = unit.features if unit.normed else self.wiring.states[output].channels
                value = self.step(unit, names, values, channels, unit.size(size))
            if i == last:
                self.terms.setdefault(output, []).append((value, norm))
            else:
                values = [self.sum([(value, norm)])]


def make_plan(wiring: Wiring, *, running: bool = False) -> Plan:
    """Lists a network's steps.

    Args:
      wiring: the architecture's operations.
      running: batch norm with given statistics, in place of those of the batch.
    """
    lister = _Lister(wiring, running)
    *operations, (head,) = network_pieces(wiring)
    for op, pieces in zip(wiring.operations, operations, strict=True):
        lister.operation(pieces, op.inputs, op.output)
    values = [None if s is None else lister.read(s) for s in wiring.head.feature]
    assert isinstance(head.unit, Classifier)
    lister.step(head.unit, head.names, values, wiring.head.dims[-1], 1)
    return Plan(wiring, tuple(lister.steps), tuple(lister.values), lister.states)
