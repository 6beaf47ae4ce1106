"""What users give as a model, its variables and its call's arguments: checked, copied, rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from ghn_jax.files.messages import what_is


def check_variables(variables) -> None:
    """Checks that something is a Linen model's variables, or an NNX module with arrays.

    Raises:
      TypeError: it is something else.
      ValueError: it is a tree of parameters alone, or an abstract module.
    """
    if isinstance(variables, nnx.Module):
        _check_is_not_abstract(variables)
    elif not isinstance(variables, Mapping):
        hint = ""
        if isinstance(variables, tuple):
            hint = "; predict_model returns (variables, report): give the first"
        raise TypeError(
            f"the variables are {what_is(variables)}; allowed: a Linen model's variables, "
            f"{{'params': ...}}, or an NNX module{hint}"
        )
    # Norms without a scale and bias have statistics alone, other models nothing at all.
    elif variables and not {"params", "batch_stats"} & set(variables):
        names = ", ".join(map(repr, list(variables)[:3]))
        raise ValueError(
            f"the variables have no 'params' but {names}; a tree of parameters alone is given as "
            "{'params': tree}, with the model's other collections beside it"
        )


def _check_is_not_abstract(module: nnx.Module) -> None:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(module))):
        raise ValueError(
            f"the {type(module).__name__} is abstract (nnx.eval_shape): it has shapes in place of "
            "arrays; give a module with arrays, as predict_model returns it"
        )


def check_model_and_variables(model, variables) -> None:
    """Checks that a model is a module, and its variables are of its kind.

    Args:
      model: an instance of a module of Linen or NNX.
      variables: of a Linen model; of an NNX model the module that holds them.

    Raises:
      TypeError: the model is no module, or the variables are of another kind.
      ValueError: as `check_variables`.
    """
    if isinstance(model, nnx.Module):
        if not isinstance(variables, nnx.Module):
            raise TypeError(
                f"the model is an NNX module, but the variables are {what_is(variables)}; give the "
                "NNX module that holds them, as predict_model returns it"
            )
    elif not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is {what_is(model)}; give a Linen or an NNX module, an instance of it"
        )
    elif isinstance(variables, nnx.Module):
        raise TypeError(
            f"the model is a Linen module, but the variables are an NNX module "
            f"({type(variables).__name__}); give the Linen model's variables, {{'params': ...}}"
        )
    check_variables(variables)


def with_collection(variables: Mapping, name: str, leaves: Sequence) -> Any:
    """Variables with other leaves in one collection, in a tree as it was given: dicts, FrozenDicts.

    Args:
      variables: a Linen model's.
      name: of the collection.
      leaves: in the order of `jax.tree.leaves` of that collection.
    """
    old, structure = jax.tree.flatten(variables)
    numbers = jax.tree.leaves(jax.tree.unflatten(structure, range(len(old)))[name])
    new = dict(zip(numbers, leaves, strict=True))
    return jax.tree.unflatten(structure, [new.get(i, leaf) for i, leaf in enumerate(old)])


def _is_node(value) -> bool:
    return isinstance(value, nnx.Pytree)  # modules, Rngs, streams of them


def copied_nodes(arguments: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """A function that makes a call's arguments anew, with copies of all NNX objects in them.

    What a traced function changes in an object (the counts of `nnx.Rngs`) must have been made in
    it; so each trace calls this for its own. The objects given are not changed.
    """
    nodes: list[nnx.Pytree] = []
    makers = {name: _maker(value, nodes) for name, value in arguments.items()}
    definition, state = nnx.split(nodes)  # together: what two of them share stays shared

    def make() -> dict[str, Any]:
        copies = nnx.merge(definition, jax.tree.map(lambda x: x, state))
        return {name: of(copies) for name, of in makers.items()}

    return make


def _maker(value, nodes: list[nnx.Pytree]) -> Callable[[Sequence], Any]:
    """A function that makes a value of copies of the NNX objects in it, which are listed."""
    if _is_node(value):
        at = next((i for i, node in enumerate(nodes) if node is value), len(nodes))
        if at == len(nodes):
            nodes.append(value)
        return lambda copies: copies[at]
    if type(value) is dict:  # JAX takes those alone whose keys can be sorted
        made = {key: _maker(part, nodes) for key, part in value.items()}
        return lambda copies: {key: of(copies) for key, of in made.items()}
    parts, structure = jax.tree.flatten(value, is_leaf=lambda x: _is_node(x) or type(x) is dict)
    if len(parts) == 1 and parts[0] is value:
        return lambda _: value
    makers = [_maker(part, nodes) for part in parts]
    return lambda copies: jax.tree.unflatten(structure, [of(copies) for of in makers])
