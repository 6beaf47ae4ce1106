"""Official parameter names (those of the authors' PyTorch modules) and trees of Flax."""

from __future__ import annotations


def parameter_path(name: str) -> tuple[str, ...]:
    """The Flax module path of an official parameter name, without the leaf.

    >>> parameter_path("cells.0._ops.1.op.2.weight")
    ('cells_0', 'ops_1', 'op_2')
    """
    path: list[str] = []
    for part in name.split(".")[:-1]:
        if part.isdigit():
            path[-1] += "_" + part
        else:
            path.append(part.removeprefix("_"))
    return tuple(path)


def check_names(have: set[str], want: set[str], what: str) -> None:
    """Raises ValueError, listing names, unless both sets are the same."""
    if have != want:
        missing, unknown = sorted(want - have), sorted(have - want)
        raise ValueError(
            f"{what} are not those of the architecture: missing {missing[:5]} "
            f"({len(missing)} in all), unknown {unknown[:5]} ({len(unknown)} in all)"
        )


def insert(tree: dict, path: tuple[str, ...], value) -> None:
    """Sets tree[path[0]][path[1]]... = value, making the dictionaries on the way."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
