r"""The paper's experiments: the command `ghn-paper`, from a checkout.

    python eval/paper.py trained-networks --quick

`--help` lists them; each is a file of `ghn_jax/evaluation/experiments/`.
"""

from ghn_jax.cli.paper import run

if __name__ == "__main__":
    run()
