"""When two architectures are the same network (paper § 3, § A.2).

The order of a cell's nodes, of a node's two edges and of the states in a concat is arbitrary; nodes
that nothing reads, `none` edges and options without effect are not part of the network, and
identities are what they read. `canonical` removes all of that, exactly: two architectures have
equal forms if and only if they differ in nothing else.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ghn_jax.deepnets1m.architecture import Architecture, Edge


class Form(NamedTuple):
    """The canonical form of an architecture, but for its width.

    Attributes:
      normal, reduce: the cells; `reduce` is () where no cell is a reduction.
      options: everything else that has an effect, without C and fc_dim.
    """

    normal: tuple
    reduce: tuple
    options: tuple


def _nodes(
    edges: Sequence[Edge], concat: Sequence[int], strided: bool
) -> tuple[list[list[Edge]], list[int | None]]:
    """Edges of each node without `none`, and the output's states, identities passed through.

    States are numbered as in the genotype; None is a state that nothing writes.
    """
    passed: list[int | None] = [0, 1]
    nodes: list[list[Edge]] = [[], []]
    for node in range(len(edges) // 2):
        live, identity = [], None
        for kind, source in edges[2 * node : 2 * node + 2]:
            if kind == "none" or passed[source] is None:
                continue
            if kind == "skip_connect" and strided and source < 2:
                kind = "factorized_reduce"
            if kind == "skip_connect":
                identity = passed[source]
            live.append((kind, passed[source]))
        nodes.append(live)
        if not live:
            passed.append(None)
        elif len(live) == 1 and identity is not None:
            passed.append(identity)
        else:
            passed.append(node + 2)
    return nodes, [passed[state] for state in concat]


def _refine(nodes: list[list[Edge]], live: list[int], output: list[int | None]) -> dict:
    """Colours of states that no renumbering of nodes changes; equal ones may still differ."""
    colours = {0: -2, 1: -1, **{state: output.count(state) for state in live}}
    for _ in live:
        readers: dict[int, list] = {state: [] for state in colours}
        for state in live:
            for kind, source in nodes[state]:
                readers[source].append((kind, colours[state]))
        signatures = {
            state: (
                colours[state],
                sorted((kind, colours[source]) for kind, source in nodes[state]),
                sorted(readers[state]),
            )
            for state in live
        }
        ranks = sorted(signatures.values())
        refined = {state: ranks.index(signatures[state]) for state in live}
        done = len(set(refined.values())) == len({colours[state] for state in live})
        colours.update(refined)
        if done:
            break
    return colours


def cell_form(edges: Sequence[Edge], concat: Sequence[int], strided: bool) -> tuple:
    """The canonical form of one cell.

    Args:
      edges, concat: as in a `Genotype`.
      strided: whether edges from the cell's inputs halve the resolution.

    Returns:
      For each node that the output depends on, its edges, sorted, and then the states of the
      output, sorted; None stands for all-zero ones.
    """
    nodes, output = _nodes(edges, concat, strided)
    readers = collections.Counter(output)
    for state in range(len(nodes) - 1, 1, -1):
        if readers[state]:
            readers.update(source for _, source in nodes[state])
    live = [state for state in range(2, len(nodes)) if readers[state]]
    for state in live:
        # Adding a state of one operation, read here only, is having that operation here.
        nodes[state] = [
            nodes[s][0]
            if kind == "skip_connect" and s > 1 and len(nodes[s]) == readers[s] == 1
            else (kind, s)
            for kind, s in nodes[state]
        ]
    read = {source for state in live for _, source in nodes[state]}.union(output)
    live = [state for state in live if state in read]
    colours = _refine(nodes, live, output) if len(live) > 1 else {}

    # Nodes with the same edges and readers are interchangeable: one order of them will do.
    def twin(state: int):
        read_by = [(kind, s) for s in live for kind, source in nodes[s] if source == state]
        return sorted(nodes[state]), sorted(read_by), output.count(state)

    groups = []
    for _, group in itertools.groupby(sorted(live, key=colours.get), key=colours.get):
        members = list(group)
        if len(members) > 1 and all(twin(m) == twin(members[0]) for m in members[1:]):
            groups.append([members])
        else:
            groups.append(list(itertools.permutations(members)))

    def form(order) -> tuple:
        number = {0: 0, 1: 1, None: -1}
        number.update((state, i) for i, state in enumerate(itertools.chain(*order), 2))
        return (
            *(tuple(sorted((k, number[s]) for k, s in nodes[m])) for m in itertools.chain(*order)),
            tuple(sorted(number[state] for state in output)),
        )

    return min(form(order) for order in itertools.product(*groups))


def normal_form(arch: Architecture) -> tuple:
    """The first part of `canonical`."""
    return cell_form(arch.genotype.normal, arch.genotype.normal_concat, False)


def canonical(arch: Architecture) -> Form:
    """The canonical form of an architecture; equal forms are the same network but for its width."""
    genotype = arch.genotype
    reduces = any(arch.is_reduction(i) for i in range(arch.n_cells))
    strided = not arch.has_attention
    if arch.has_attention:
        stem = ("vit",)
    else:
        stem = (arch.stem_type, arch.ks, arch.stem_type == 0 and arch.stem_pool)
    return Form(
        normal_form(arch),
        cell_form(genotype.reduce, genotype.reduce_concat, strided) if reduces else (),
        (
            arch.n_cells,
            arch.C_mult if reduces else 1,
            stem,
            arch.norm is not None,
            arch.preproc,
            arch.glob_avg,
            max(arch.fc_layers, 1),
        ),
    )
