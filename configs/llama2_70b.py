"""Llama-2 70B (Touvron et al. 2023), with eight exits tuned behind it.

    python -m launch.tune --config=configs/llama2_70b.py:source=meta-llama/Llama-2-70b-hf,data=… \
        --workdir=…
    python -m launch.compile --config=configs/llama2_70b.py --topology=v5p:4x4x8

The second needs neither weights nor chips. Settings: `configs/ee_tuning.py`.
"""

from configs import ee_tuning
from early_exit.settings.overrides import ConfigDict

DECODER = {
    "vocab_size": 32_000,
    "width": 8192,
    "depth": 80,
    "heads": 64,
    "kv_heads": 8,
    "head_dim": 128,
    "mlp_width": 28_672,
    "context_length": 4096,
    "tied": False,
}


def get_config(arg: str | None = None) -> ConfigDict:
    return ee_tuning.settings(arg, new=DECODER, tensor=8)
