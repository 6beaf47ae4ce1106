r"""Predicts parameters for unseen architectures and evaluates them: `ghn-eval`, from a checkout.

    python eval/eval_ghn.py --ckpt runs/x --dataset cifar10 --data-dir DIR --split test --num 20 \
        --out results.json

`--help` explains every option; how networks are evaluated is `ghn_jax/evaluation/accuracy.py`.
"""

from ghn_jax.cli.evaluate import run

if __name__ == "__main__":
    run()
