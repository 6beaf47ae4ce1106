"""The authors' training and evaluation (facebookresearch/ppuda), timed for `reference.py`.

Reads one JSON line for each request and answers with one, {"seconds": ..., "cpu_seconds": ...,
"memory_mb": ...}. Requests are a meta-batch, {"indices": [...], "C": [...], "fc_dim": [...]}, a
network of the `test` split to run over images, {"index": ..., "C": ..., "images": ...}, or one to
train for an epoch, {"index": ..., "C": ..., "seed": ..., "start": ..., "images": ...}.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch


def _import_torchvision() -> None:
    """Its networks import without its compiled part, of which there is none for every torch."""
    register = torch.library.register_fake

    def register_known(name, *args, **options):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **options)

    torch.library.register_fake = register_known


def answer_updates(nets: str, batch_size: int):
    """Meta-batches -> seconds of the update, on the GPU if torch has one."""
    from ppuda.deepnets1m.graph import GraphBatch
    from ppuda.deepnets1m.loader import DeepNets1M
    from ppuda.deepnets1m.net import Network
    from ppuda.ghn.nn import GHN
    from ppuda.utils import Trainer

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ghn = GHN(max_shape=(64, 64, 11, 11), num_classes=10, hypernet="gatedgnn", decoder="conv",
              weight_norm=True, ve=True, layernorm=True, hid=32).to(device)  # fmt: skip
    optimizer = torch.optim.Adam(ghn.parameters(), 1e-3, weight_decay=1e-5)
    trainer = Trainer(optimizer, 10, False, n_batches=10**9, grad_clip=5, device=device,
                      log_interval=10**9)  # fmt: skip
    ghn.train()
    graphs = DeepNets1M(nets_dir=str(Path(nets).parent), split="train", virtual_edges=50)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)

    def answer(indices, C, fc_dim):
        start = time.perf_counter()
        batch = []
        for index, width, hidden in zip(indices, C, fc_dim, strict=True):
            graph = graphs[index]
            graph.net_args.update(C=width, fc_dim=hidden)
            batch.append(graph)
        networks = [
            Network(is_imagenet_input=False, num_classes=10, light=True, **graph.net_args)
            for graph in batch
        ]
        trainer.update(
            networks, images, labels, ghn=ghn, graphs=GraphBatch(batch).to_device(device)
        )
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return answer


def answer_evaluations(nets: str, batch_size: int):
    """Networks -> seconds to make them and to run them over images, of no particular parameters."""
    from ppuda.deepnets1m.loader import DeepNets1M
    from ppuda.deepnets1m.net import Network
    from ppuda.utils import infer

    graphs = DeepNets1M(nets_dir=str(Path(nets).parent), split="test", virtual_edges=50)

    def answer(index, C, images):
        graph = graphs[index]
        graph.net_args.update(C=C)
        data = torch.utils.data.TensorDataset(
            torch.randn(images, 3, 32, 32), torch.randint(0, 10, (images,))
        )
        loader = torch.utils.data.DataLoader(data, batch_size)
        start = time.perf_counter()
        network = Network(is_imagenet_input=False, num_classes=10, **graph.net_args).eval()
        infer(network, loader)
        return time.perf_counter() - start

    return answer


def answer_training(nets: str, batch_size: int):
    """Networks -> {"top1", "training"}: accuracy after an epoch, and its seconds."""
    import numpy as np
    from ppuda.deepnets1m.loader import DeepNets1M
    from ppuda.deepnets1m.net import Network
    from ppuda.utils import Trainer, infer
    from safetensors.torch import load_file

    graphs = DeepNets1M(nets_dir=str(Path(nets).parent), split="test", virtual_edges=1)

    def answer(index, C, seed, start, images):
        graph = graphs[index]
        graph.net_args.update(C=C)
        if graph.net_args.get("norm") == "bn":
            graph.net_args["norm"] = "bn-track"
        network = Network(is_imagenet_input=False, num_classes=10, **graph.net_args)
        missing, unknown = network.load_state_dict(load_file(start), strict=False)
        assert not unknown, unknown
        data = np.load(images)
        mean, std = data["mean"], data["std"]
        rng = np.random.default_rng(seed)

        def batches(part, train):
            pixels, labels = data[f"{part}_x"], torch.from_numpy(data[f"{part}_y"]).long()
            padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
            order = rng.permutation(len(pixels)) if train else np.arange(len(pixels))
            last = len(order) - len(order) % batch_size if train else len(order)
            for i in range(0, last, batch_size):
                some = order[i : i + batch_size]
                if train:
                    crops = zip(some, rng.integers(0, 9, (len(some), 2)), strict=True)
                    x = np.stack([padded[n, a : a + 32, b : b + 32] for n, (a, b) in crops])
                    flip = rng.random(len(some)) < 0.5
                    x[flip] = x[flip, :, ::-1]
                else:
                    x = pixels[some]
                x = (x.astype(np.float32) / 255 - mean) / std
                yield torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), labels[some]

        optimizer = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
        trainer = Trainer(optimizer, 10, False, n_batches=10**9, grad_clip=5, device="cpu",
                          log_interval=10**9)  # fmt: skip
        network.train()
        begin = time.perf_counter()
        for x, y in batches("train", True):
            trainer.update(network, x, y)
        # What was not given is not read: cells that nobody listens to.
        unread = {n for n, p in network.named_parameters() if p.grad is None}
        assert {n for n in missing if "running" not in n and "num_batches" not in n} <= unread
        seconds = time.perf_counter() - begin
        top1, _ = infer(network.eval(), list(batches("test", False)))
        return {"top1": top1 / 100, "training": seconds, "seconds": time.perf_counter() - begin}

    return answer


def main(task: str, code: str, nets: str, batch_size: int) -> None:
    """Answers requests until the input ends."""
    sys.path.insert(0, code)
    _import_torchvision()
    tasks = {"update": answer_updates, "evaluate": answer_evaluations, "train": answer_training}
    answer = tasks[task](nets, batch_size)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        cpu = time.process_time()
        answered = answer(**json.loads(line))
        cpu = time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = answered if isinstance(answered, dict) else {"seconds": answered}
        print(json.dumps({**found, "cpu_seconds": cpu, "memory_mb": memory}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
