r"""Trains a graph hypernetwork: the command `ghn-train`, from a checkout.

    python train/train_ghn.py --dataset cifar10 --data-dir DIR --preset ghn2 --steps 200 \
        --out runs/x

`--help` explains every option; the loop is `ghn_jax/training/loop.py`.
"""

from ghn_jax.cli.train import run

if __name__ == "__main__":
    run()
