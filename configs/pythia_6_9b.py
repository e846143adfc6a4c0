"""Pythia 6.9B (Biderman et al. 2023), with eight exits tuned behind it.

    python -m launch.tune --config=configs/pythia_6_9b.py:source=EleutherAI/pythia-6.9b,data=… \
        --workdir=…
    python -m launch.compile --config=configs/pythia_6_9b.py --topology=v5e:4x4

The second needs neither weights nor chips. Settings: `configs/ee_tuning.py`.
"""

from configs import ee_tuning
from early_exit.settings.overrides import ConfigDict

DECODER = {
    "vocab_size": 50_432,
    "width": 4096,
    "depth": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "mlp_width": 16_384,
    "context_length": 2048,
    "norm": "layer",
    "gated": False,
    "activation": "gelu",
    "parallel": True,
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "rotary_fraction": 0.25,
    "tied": False,
}


def get_config(arg: str | None = None) -> ConfigDict:
    return ee_tuning.settings(arg, new=DECODER, tensor=4)
