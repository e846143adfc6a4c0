"""Llama-3 8B (Grattafiori et al. 2024), with eight exits tuned behind it.

    python -m launch.tune --config=configs/llama3_8b.py:source=meta-llama/Meta-Llama-3-8B,data=… \
        --workdir=…
    python -m launch.compile --config=configs/llama3_8b.py --topology=v5p:2x2x4
    python -m launch.compile --config=configs/llama3_8b.py --topology=v5e:4x4 \
        --config.mesh.data=1 --config.mesh.fsdp=4

The others need neither weights nor chips. Settings: `configs/ee_tuning.py`.
"""

from configs import ee_tuning
from early_exit.settings.overrides import ConfigDict

DECODER = {
    "vocab_size": 128_256,
    "width": 4096,
    "depth": 32,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "mlp_width": 14_336,
    "context_length": 8192,
    "rope_theta": 500_000.0,
    "tied": False,
}


def get_config(arg: str | None = None) -> ConfigDict:
    return ee_tuning.settings(arg, new=DECODER, tensor=4)
