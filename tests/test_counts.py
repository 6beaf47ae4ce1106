"""Counts of parameters and FLOPs against the Flax modules."""

import math

import jax
import jax.numpy as jnp
import pytest
from definition import unit_by_unit

from ghn_jax import build_network, count_flops, count_parameters, sample_architecture
from ghn_jax.deepnets1m.architecture import DARTS, OPERATIONS, VIT, Architecture, Genotype
from ghn_jax.deepnets1m.sampling import SPLITS


def flops_of(jaxpr) -> int:
    """Twice the multiply-adds of the convolutions and products in a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        primitive, out = equation.primitive.name, equation.outvars[0].aval.shape
        shapes = [v.aval.shape for v in equation.invars]
        if primitive == "conv_general_dilated":
            kernel = shapes[1]  # HWIO
            total += 2 * math.prod(out) * math.prod(kernel[:3])
        elif primitive == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(out) * math.prod(shapes[0][d] for d in contracted)
        else:
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", None)
                if inner is not None:
                    total += flops_of(inner)
    return total


def of_module(arch, image_size=32) -> tuple[int, int]:
    """FLOPs and parameters."""
    network = build_network(arch, 10, image_size)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with unit_by_unit():  # units that were traced before are not traced again
        params = jax.eval_shape(network.init, jax.random.key(0), images)
        flops = flops_of(jax.make_jaxpr(network.apply)(params, images).jaxpr)
    return flops, sum(leaf.size for leaf in jax.tree.leaves(params))


def counted(arch, image_size=32) -> tuple[int, int]:
    return tuple(count(arch, image_size=image_size) for count in (count_flops, count_parameters))


def cells(operation: str) -> Genotype:
    edges = ((operation, 0), (operation, 1))
    return Genotype(edges, (2,), edges, (2,))


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_each_operation(operation):
    """All operations of these networks are used, so that the modules have all parameters."""
    for C_mult in (1, 2):
        arch = Architecture(cells(operation), n_cells=4, C=16, C_mult=C_mult)
        assert counted(arch) == of_module(arch)


@pytest.mark.parametrize("options", [
    {"stem_type": 1}, {"stem_type": 0, "stem_pool": True}, {"ks": 7}, {"norm": None},
    {"preproc": False, "C_mult": 1}, {"glob_avg": False, "fc_layers": 2},
])  # fmt: skip
@pytest.mark.parametrize("image_size", [32, 224])
def test_each_option(options, image_size):
    arch = Architecture(cells("conv_3x3"), **{"n_cells": 4, "C": 16, **options})
    assert counted(arch, image_size) == of_module(arch, image_size)


@pytest.mark.parametrize("split", SPLITS)
def test_sampled_architectures(split):
    for i in range(4):
        arch = sample_architecture(split, 5, i)
        flops, parameters = of_module(arch)
        assert count_flops(arch) == flops
        assert count_parameters(arch) >= parameters  # of operations that are not used too


def test_named_cells():
    for arch in (
        Architecture(DARTS, n_cells=8, C=16),
        Architecture(VIT, n_cells=4, C=32, C_mult=1, preproc=False),
    ):
        for image_size in (32, 224):
            assert count_flops(arch, image_size=image_size) == of_module(arch, image_size)[0]
