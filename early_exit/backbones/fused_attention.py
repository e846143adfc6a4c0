"""Attention in one kernel, where a GPU's or a TPU's library has one for the case.

The one idea: what a library takes, the library says. cuDNN is asked by tracing a call, which fails
where there is no GPU, or one that lacks the case. Only half precision is given to kernels: they
would round float32 inside.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from early_exit import sharding
from early_exit.backbones.scoring import USUAL, Scoring
from early_exit.backbones.visibility import Visibility

_HALF = (jnp.bfloat16, jnp.float16)
# Positions that a TPU's kernel takes at a time; the largest that divides T, and none smaller.
_BLOCKS = (512, 256, 128)


def kernels(
    query: jax.Array, key: jax.Array, visibility: Visibility, scoring: Scoring = USUAL
) -> dict[str, Callable[..., jax.Array]]:
    """Platform, as `jax.lax.platform_dependent` calls it → its kernel, if it takes this case.

    The kernels take queries [B, T, H, d], keys and values [B, T, K, d], and the visibility.
    """
    found = {}
    if query.dtype not in _HALF or not visibility.causal or visibility.real is not None:
        return found
    asked = query.shape, key.shape, query.dtype
    if visibility.documents is None and scoring.cap is None and _cudnn_takes(*asked):
        found["cuda"] = functools.partial(on_gpu, scoring=scoring)
    if query.shape[1] % _BLOCKS[-1] == 0 and sharding.is_known():
        found["tpu"] = functools.partial(on_tpu, scoring=scoring)
    return found


def on_gpu(
    query_BTHd, key_BTKd, value_BTKd, visibility: Visibility, scoring: Scoring = USUAL
) -> jax.Array:
    """cuDNN's, which has no ids but as a T × T bias, and no soft cap."""
    window = visibility.window
    return jax.nn.dot_product_attention(
        query_BTHd,
        key_BTKd,
        value_BTKd,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


@functools.lru_cache(maxsize=64)
def _cudnn_takes(query_shape, key_shape, dtype) -> bool:
    query, key = (jax.ShapeDtypeStruct(shape, dtype) for shape in (query_shape, key_shape))

    def total(query, key, value):
        return on_gpu(query, key, value, Visibility(causal=True)).sum()

    try:  # with its gradient: there are cases that only forwards are taken
        jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), query, key, key)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def on_tpu(
    query_BTHd,
    key_BTKd,
    value_BTKd,
    visibility: Visibility,
    scoring: Scoring = USUAL,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention. The compiler cannot split a kernel: each device is given its part.

    Args:
      interpret: whether to run the kernel step by step, on any device.
    """
    # Slow to import, and needed by few.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def local(query, key, value, documents):
        kernel = _splash(*query.shape[1:3], visibility.window, scoring.cap, interpret)
        scaled = query * scoring.factor(query.shape[-1])
        heads_first = [x.swapaxes(1, 2) for x in (scaled, key, value)]
        ids = None if documents is None else splash.SegmentIds(documents, documents)
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

    split = sharding.by_row_and_head(local, key_BTKd.shape[2])
    return split(query_BTHd, key_BTKd, value_BTKd, visibility.documents)


def _splash(length: int, heads: int, window: int | None, cap: float | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in _BLOCKS if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    behind = None if window is None else window - 1
    mask = splash.LocalMask((length, length), (behind, 0), 0)
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
