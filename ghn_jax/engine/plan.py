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
      droppable: step of a state -> which of its terms drop path may drop.
    """

    wiring: Wiring
    steps: tuple[Step, ...]
    values: tuple[StateInfo, ...]
    states: dict[int, Value]
    droppable: dict[int, tuple[bool, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def last_reader(self) -> dict[Value, int]:
        """The last step that reads each value."""
        return {v: i for i, step in enumerate(self.steps) for v in step.inputs if v is not None}


class _Term(NamedTuple):
    """What a state adds up.

    Attributes:
      value: what an operation computed.
      norm: name of the batch norm behind it, or ''.
      droppable: whether drop path may drop it.
    """

    value: Value
    norm: str = ""
    droppable: bool = False


class _Lister:
    def __init__(self, wiring: Wiring, running: bool, drop_path: bool):
        self.wiring, self.running, self.drop_path = wiring, running, drop_path
        self.steps: list[Step] = []
        self.values = [wiring.states[IMAGE]]
        self.states: dict[int, Value] = {IMAGE: IMAGES}
        self.terms: dict[int, list[_Term]] = {}
        self.droppable: dict[int, tuple[bool, ...]] = {}

    def step(self, unit: Unit, names, inputs, channels: int, size: int) -> Value:
        """Lists a step; returns the value that it writes."""
        self.values.append(StateInfo(channels, size))
        self.steps.append(Step(unit, tuple(names), tuple(inputs), len(self.values) - 1))
        return self.steps[-1].output

    def sum(self, terms: list[_Term]) -> Value:
        """The value that terms add up to, each behind its batch norm."""
        normed = [term for term in terms if term.norm]
        terms = [*normed, *(term for term in terms if not term.norm)]
        drop = tuple(term.droppable for term in terms)
        if not normed and len(terms) == 1 and not any(drop):
            return terms[0].value
        channels, size = self.values[terms[0].value]
        running = self.running and bool(normed)
        unit = NormSum(channels, len(normed), running, len(drop) if any(drop) else 0)
        if any(drop):
            self.droppable[len(self.steps)] = drop
        names, inputs = [term.norm for term in normed], [term.value for term in terms]
        return self.step(unit, names, inputs, channels, size)

    def read(self, state: int) -> Value:
        """A state's value; all that adds to it was listed before."""
        if state not in self.states:
            self.states[state] = self.sum(self.terms[state])
        return self.states[state]

    def operation(self, pieces: tuple[Piece, ...], inputs, output: int, in_cell: bool) -> None:
        """Lists an operation; `in_cell`: of a node of a cell, not a stem or a preprocessing one."""
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
                droppable = self.drop_path and in_cell and unit != Identity()
                self.terms.setdefault(output, []).append(_Term(value, norm, droppable))
            else:
                values = [self.sum([_Term(value, norm)])]


def make_plan(wiring: Wiring, *, running: bool = False, drop_path: bool = False) -> Plan:
    """Lists a network's steps.

    Args:
      wiring: the architecture's operations.
      running: batch norm with given statistics, in place of those of the batch.
      drop_path: what cells' operations compute, but for identities, is dropped at times (C.2.3).
    """
    lister = _Lister(wiring, running, drop_path)
    *operations, (head,) = network_pieces(wiring)
    for op, pieces in zip(wiring.operations, operations, strict=True):
        lister.operation(pieces, op.inputs, op.output, "._ops." in op.name)
    values = [None if s is None else lister.read(s) for s in wiring.head.feature]
    assert isinstance(head.unit, Classifier)
    lister.step(head.unit, head.names, values, wiring.head.dims[-1], 1)
    return Plan(wiring, tuple(lister.steps), tuple(lister.values), lister.states, lister.droppable)
