"""Llama-2 13B (Touvron et al. 2023), with eight exits tuned behind it.

    python -m launch.tune --config=configs/llama2_13b.py:source=meta-llama/Llama-2-13b-hf,data=… \
        --workdir=…
    python -m launch.compile --config=configs/llama2_13b.py --topology=v5p:2x2x4

The second needs neither weights nor chips. Settings: `configs/ee_tuning.py`.
"""

from configs import ee_tuning
from early_exit.settings.overrides import ConfigDict

DECODER = {
    "vocab_size": 32_000,
    "width": 5120,
    "depth": 40,
    "heads": 40,
    "kv_heads": 40,
    "head_dim": 128,
    "mlp_width": 13_824,
    "context_length": 4096,
    "tied": False,
}


def get_config(arg: str | None = None) -> ConfigDict:
    return ee_tuning.settings(arg, new=DECODER, tensor=4)
