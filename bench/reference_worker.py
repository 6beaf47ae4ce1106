"""The authors' training update and evaluation (facebookresearch/ppuda), timed for `reference.py`.

Reads one JSON line for each request and answers with one, {"seconds": ..., "cpu_seconds": ...,
"memory_mb": ...}. Requests are a meta-batch, {"indices": [...], "C": [...], "fc_dim": [...]}, or a
network of the `test` split to run over images, {"index": ..., "C": ..., "images": ...}.
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


def main(task: str, code: str, nets: str, batch_size: int) -> None:
    """Answers requests until the input ends."""
    sys.path.insert(0, code)
    _import_torchvision()
    answer = {"update": answer_updates, "evaluate": answer_evaluations}[task](nets, batch_size)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        cpu = time.process_time()
        seconds = answer(**json.loads(line))
        cpu = time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "memory_mb": memory}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
