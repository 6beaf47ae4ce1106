"""Modules under the names that they had in version 0.1, for one release.

`python -m ghn_jax.parity` and `from ghn_jax.images import load_images` go on working: a name that
is not there any more is looked up here, and the module of the new name is what is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys

_MOVED = {
    "architecture": "deepnets1m",
    "canonical": "deepnets1m",
    "counts": "deepnets1m",
    "evaluation_sets": "deepnets1m",
    "graph": "deepnets1m",
    "network": "deepnets1m",
    "operations": "deepnets1m",
    "sampling": "deepnets1m",
    "wiring": "deepnets1m",
    "checkpoint": "hypernet",
    "decoder": "hypernet",
    "gatedgnn": "hypernet",
    "ghn": "hypernet",
    "compilation": "engine",
    "fourier": "engine",
    "memory": "engine",
    "plan": "engine",
    "programs": "engine",
    "decoding": "training",
    "launch": "training",
    "mesh": "training",
    "meta_loss": "training",
    "batch_statistics": "evaluation",
    "network_training": "evaluation",
    "precision": "evaluation",
    "reinitialise": "evaluation",
    "abstract_values": "tracing",
    "flow": "tracing",
    "jaxpr_graph": "tracing",
    "prediction": "tracing",
    "report": "tracing",
    "torch_file": "interop",
    "torch_ghn": "interop",
    "torch_models": "interop",
    "torch_network": "interop",
    "augment": "data",
    "images": "data",
    "charts": "plot",
    "drawing": "plot",
    "figure": "plot",
    "layout": "plot",
    "convert": "interop",
    "parity": "interop",
}
_RENAMED = {
    "cpu_kernels": "engine.cpu_layers",
    "kernels": "deepnets1m.layers",
    "metabatch": "training.meta_batch",
    "metastep": "training.update",
    "parameters": "hypernet.tiling",
    "presets": "training.config",
    "program_store": "engine.programs",
    "deepnets1m.figures": "plot.splits",
    "deepnets1m.__main__": "cli.deepnets1m",
}
NAMES = {
    **{f"ghn_jax.{name}": f"ghn_jax.{package}.{name}" for name, package in _MOVED.items()},
    **{f"ghn_jax.{old}": f"ghn_jax.{new}" for old, new in _RENAMED.items()},
}


# What is in another module now: the module's old name -> a name in it -> where it is.
_ELSEWHERE = {
    "ghn_jax.convert": {"main": "ghn_jax.cli.convert.main"},
    "ghn_jax.graph": {
        "next_power_of_two": "ghn_jax.hypernet.padding.next_power_of_two",
        "pad_graphs": "ghn_jax.hypernet.padding.pad_graphs",
    },
    "ghn_jax.parity": {"main": "ghn_jax.cli.parity.main"},
    "ghn_jax.prediction": {"predict": "ghn_jax.tracing.prediction.predict_model"},
    "ghn_jax.program_store": {"ProgramStore": "ghn_jax.engine.programs.Programs"},
}

# What `python -m` runs under an old name, where that is not the module itself.
_COMMANDS = {
    "ghn_jax.convert": "ghn_jax.cli.convert",
    "ghn_jax.parity": "ghn_jax.cli.parity",
}


class _Loader(importlib.abc.InspectLoader):
    """Gives the module of the new name where one of an old name is asked for."""

    def create_module(self, spec):
        module = importlib.import_module(NAMES[spec.name])
        self._spec = module.__spec__
        for name, where in _ELSEWHERE.get(spec.name, {}).items():
            place, _, new = where.rpartition(".")
            setattr(module, name, getattr(importlib.import_module(place), new))
        return module

    def exec_module(self, module) -> None:
        module.__spec__ = self._spec  # Python has set that of the old name

    def get_source(self, fullname):
        return importlib.util.find_spec(NAMES[fullname]).loader.get_source(NAMES[fullname])

    def get_code(self, fullname):
        """For `python -m`."""
        name = _COMMANDS.get(fullname, NAMES[fullname])
        return importlib.util.find_spec(name).loader.get_code(name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in NAMES:
            return None
        origin = importlib.util.find_spec(NAMES[fullname]).origin
        return importlib.machinery.ModuleSpec(fullname, _Loader(), origin=origin)


def keep_old_names() -> None:
    """From now on, modules are found under their old names too."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
