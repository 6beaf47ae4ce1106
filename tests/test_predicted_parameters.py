"""How different and how sparse predicted parameters are (§ C.3)."""

import json

import jax
import numpy as np
import pytest

from ghn_jax.cli import paper
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.evaluation.accuracy import random_parameters
from ghn_jax.evaluation.experiments import predicted_parameters as experiment
from ghn_jax.evaluation.experiments import trained_networks
from ghn_jax.evaluation.experiments.kept_parameters import read_parameters
from ghn_jax.evaluation.experiments.records import read_records
from ghn_jax.evaluation.networks import of_file
from ghn_jax.evaluation.recipe import Recipe
from ghn_jax.hypernet.checkpoint import save_ghn
from ghn_jax.hypernet.ghn import GHN

EDGES = (("sep_conv_3x3", 0), ("dil_conv_3x3", 1))


def test_diversity():
    rows = np.array([[1.0, 0, 0], [0, 2, 0], [-3, 0, 0]])
    # Of nine pairs, the four with the second row and another are at right angles.
    assert experiment.diversity(rows) == pytest.approx(4 / 9)
    assert experiment.diversity(np.ones((5, 7))) == pytest.approx(0)
    with pytest.raises(ValueError, match="1 tensors; two are needed"):
        experiment.diversity(rows[:1])
    with pytest.raises(ValueError, match="all zeros"):
        experiment.diversity(np.zeros((2, 3)))


def test_tensors_and_first_kernel_of_a_network():
    arch = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), 2, C=8)
    graph, params = build_graph(arch, 1), random_parameters(build_network(arch), 32, seed=0)
    shape = (8, 1, 3, 3)
    params["stem_0"]["kernel"] = np.where(np.arange(3 * 3 * 3 * 24) < 162, 0.049, -0.06).reshape(
        3, 3, 3, 24
    )
    found, share = experiment.look_at(graph, params, shape)
    assert share == pytest.approx(0.25)
    expected = [
        np.asarray(leaf)
        for path, leaf in jax.tree.flatten_with_path(params)[0]
        if path[-1].key == "kernel" and leaf.shape == (3, 3, 1, 8)
    ]
    assert {x.tobytes() for x in found} == {x.tobytes() for x in expected}
    assert len(found) > 1
    with pytest.raises(ValueError, match="of the network is .48, 3, 3, 3.*give the --width"):
        experiment.look_at(build_graph(arch.replace(C=16), 1), params, shape)


def test_by_the_command_with_trained_parameters(tmp_path, monkeypatch, capsys):
    ghn = GHN(max_shape=(16, 16, 7, 7))
    save_ghn(tmp_path / "one", ghn, ghn.init_variables(1))
    genotypes = (Genotype(EDGES, (2,), EDGES, (2,)), Genotype(EDGES[::-1], (2,), EDGES, (2,)))
    file = tmp_path / "nets.json"
    nets = {f"n{i}": Architecture(g, 2, C=8).to_dict() for i, g in enumerate(genotypes)}
    file.write_text(json.dumps(nets))
    trained = trained_networks.Config(
        dataset="digits", nets=file, keep_parameters=True, report_epochs=(),
        recipe=Recipe(epochs=1, batch_size=512), out=tmp_path / "sgd",
    )  # fmt: skip
    trained_networks.run(trained)
    monkeypatch.setattr(experiment, "networks", lambda config: of_file(file))
    out = tmp_path / "out"
    arguments = ["predicted-parameters", "--quick", "--ghn", str(tmp_path / "one"), "--trained",
                 str(tmp_path / "sgd"), "--image-size", "16", "--shape", "8", "1", "3",
                 "3"]  # fmt: skip
    paper.main([*arguments, "--out", str(out)])
    records = read_records(out)
    assert list(records) == ["one", "He", "He and SGD"]
    assert len({r["tensors"] for r in records.values()}) == 1
    assert records["one"]["diversity"] < records["He"]["diversity"]
    assert records["one"]["diversity"] < records["He and SGD"]["diversity"]
    (_, arch), *_ = of_file(file)
    params, other = (
        read_parameters(tmp_path / "sgd" / "parameters" / f"{n}.safetensors")
        for n, _ in of_file(file)
    )
    # Networks do not start from equal numbers because their parameters have equal names.
    assert (
        experiment.diversity(np.stack([np.ravel(p["stem_0"]["kernel"]) for p in (params, other)]))
        > 0.3
    )
    like = random_parameters(build_network(arch, 10, 16), 16, seed=0)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, like)
    assert "| GHN-2, the paper | 1000 | 760 | 0.17 | 39% |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one: 2 networks have 0 tensors of --shape 9x1x3x3"):
        paper.main([*arguments, "--out", str(tmp_path / "none"), "--shape", "9", "1", "3", "3"])
    with pytest.raises(ValueError, match="has no parameters; make them"):
        paper.main([*arguments, "--out", str(out), "--trained", str(tmp_path / "one")])


def test_networks_are_those_of_the_splits():
    names = [name for name, _ in experiment.networks(experiment.Config(networks=2))]
    assert names == ["val[0]", "val[1]", "test[0]", "test[1]"]
    assert len(experiment.networks(experiment.Config())) == 1000
    with pytest.raises(ValueError, match="--networks is 0; allowed: 1 or more"):
        experiment.networks(experiment.Config(networks=0))
