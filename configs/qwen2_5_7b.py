"""Qwen2.5 7B (Qwen team 2024), with eight exits tuned behind it.

    python -m launch.tune --config=configs/qwen2_5_7b.py:source=Qwen/Qwen2.5-7B,data=… \
        --workdir=…
    python -m launch.compile --config=configs/qwen2_5_7b.py --topology=v5p:2x2x4

The second needs neither weights nor chips. Settings: `configs/ee_tuning.py`.
"""

from configs import ee_tuning
from early_exit.settings.overrides import ConfigDict

DECODER = {
    "vocab_size": 152_064,
    "width": 3584,
    "depth": 28,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "mlp_width": 18_944,
    "context_length": 131_072,
    "norm_eps": 1e-6,
    "qkv_bias": True,
    "rope_theta": 1_000_000.0,
    "tied": False,
}


def get_config(arg: str | None = None) -> ConfigDict:
    return ee_tuning.settings(arg, new=DECODER, tensor=4)
