"""The main job in minutes, on handwritten digits: `make demo`.

    python train/demo.py

What it does is in `ghn_jax/cli/demo.py`.
"""

from ghn_jax.cli.demo import run

if __name__ == "__main__":
    run()
