"""Llama-2 7B (Touvron et al. 2023), with eight exits tuned behind it.

    python -m launch.tune --config=configs/llama2_7b.py:source=meta-llama/Llama-2-7b-hf,data=… \
        --workdir=…
    python -m launch.compile --config=configs/llama2_7b.py --topology=v5e:4x4

The second needs neither weights nor chips. Settings: `configs/ee_tuning.py`.
"""

from configs import ee_tuning
from early_exit.settings.overrides import ConfigDict

DECODER = {
    "vocab_size": 32_000,
    "width": 4096,
    "depth": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "mlp_width": 11_008,
    "context_length": 4096,
    "tied": False,
}


def get_config(arg: str | None = None) -> ConfigDict:
    return ee_tuning.settings(arg, new=DECODER, tensor=4)
