"""Early exits from nothing but JAX: attach, tune, calibrate, decode. Read it from top to bottom.

    python examples/from_primitives.py tests/fixtures/tiny_chat     # or another small Llama

The library reads the weights; all else is spelt out here for one Llama-like model, one text at a
time. At the end the library does the same in four calls; a test holds both to the same tokens.

Shapes: B rows, T positions, S cache slots, D width, H heads, K key/value heads, d head width,
V vocabulary, E exits, N recorded positions.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import early_exit as ee


class Rows(NamedTuple):
    """What a block leaves of some positions for later ones to look at, each [T, K, d]."""

    keys: jax.Array
    values: jax.Array


def normed(x, scale, eps):
    """Root mean square norm."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rotated(x_TNd, positions_T, theta):
    """Rotary positions: position p turns pair i of a head by p · θ^(−2i/d)."""
    half = x_TNd.shape[-1] // 2
    frequencies = theta ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions_T[:, None, None] * frequencies
    first, second = x_TNd[..., :half], x_TNd[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rows_of(block, hidden_TD, positions_T, config) -> Rows:
    """Keys and values of hidden states. They can be had without running the block."""
    x = normed(hidden_TD, block["attention_norm"]["scale"], config.norm_eps)
    shape = (len(x), config.kv_heads, config.head_dim)
    keys = (x @ block["attention"]["key"]["kernel"]).reshape(shape)
    values = (x @ block["attention"]["value"]["kernel"]).reshape(shape)
    return Rows(rotated(keys, positions_T, config.rope_theta), values)


def run_block(block, hidden_TD, positions_T, visible_TS, config, past: Rows | None = None):
    """(hidden states after the block, rows of these positions).

    Args:
      past: a cache that these positions look at as well, before themselves: [S, K, d] each.
      visible_TS: bool, which of the cache's positions, and then of these, each one sees.
    """
    attention, rows = block["attention"], rows_of(block, hidden_TD, positions_T, config)
    seen = rows if past is None else Rows(*map(jnp.concatenate, zip(past, rows, strict=True)))
    x = normed(hidden_TD, block["attention_norm"]["scale"], config.norm_eps)
    queries = (x @ attention["query"]["kernel"]).reshape(len(x), config.heads, config.head_dim)
    queries = rotated(queries, positions_T, config.rope_theta)
    shared = config.heads // config.kv_heads  # so many queries look at the same keys
    keys, values = (jnp.repeat(x, shared, axis=1) for x in seen)
    scores = jnp.einsum("thd,shd->hts", queries, keys) / config.head_dim**0.5
    weights = jax.nn.softmax(jnp.where(visible_TS, scores, -jnp.inf))
    mixed = jnp.einsum("hts,shd->thd", weights, values).reshape(len(x), -1)
    hidden_TD = hidden_TD + mixed @ attention["output"]["kernel"]

    mlp, x = block["mlp"], normed(hidden_TD, block["mlp_norm"]["scale"], config.norm_eps)
    gated = jax.nn.silu(x @ mlp["gate"]["kernel"]) * (x @ mlp["up"]["kernel"])
    return hidden_TD + gated @ mlp["down"]["kernel"], rows


def started(backbone, tokens_T):
    """(embedded tokens, their positions, what each sees: itself and what stands before)."""
    positions_T = jnp.arange(len(tokens_T))
    embedded_TD = backbone["embedding"]["embedding"][tokens_T]
    return embedded_TD, positions_T, positions_T[:, None] >= positions_T


def run_blocks(backbone, span, hidden, positions_T, visible_TS, config, cache=None):
    """(hidden states after blocks span[0] … span[1] − 1, the rows of each)."""
    found = []
    for i in range(*span):
        block, past = backbone["blocks"][str(i)], None if cache is None else cache[i]
        hidden, rows = run_block(block, hidden, positions_T, visible_TS, config, past)
        found.append(rows)
    return hidden, found


def logits_of(head, hidden, config):
    """A head, or the network's own end, which looks the same: a norm and an output matrix."""
    features = normed(hidden, head["norm"]["scale"], config.norm_eps)
    return features @ head["output"]["embedding"].T


def own_end(backbone):
    """The network's own readout."""
    table = backbone.get("output", backbone["embedding"])  # tied: the embedding once more
    return {"norm": backbone["final_norm"], "output": table}


def attach(backbone, points):
    """1. Attach. Early blocks nearly speak the last one's language: its end is a good start."""
    return {str(point): jax.tree.map(jnp.copy, own_end(backbone)) for point in points}


def all_logits(heads, backbone, tokens_T, points, config):
    """Logits [T, V] of every exit, and of the network's own end."""
    (hidden, *context), found = started(backbone, tokens_T), []
    ends = [heads[str(point)] for point in points] + [own_end(backbone)]
    for head, *span in zip(ends, (0, *points), (*points, config.depth), strict=True):
        hidden, _ = run_blocks(backbone, span, hidden, *context, config)
        found.append(logits_of(head, hidden, config))
    return found


def loss(heads, backbone, tokens_BT, points, config):
    """Σ over exits of KL(the full model ‖ the exit), mean over positions that have a next token."""

    def of_text(tokens_T):
        *said, teacher = all_logits(heads, backbone, tokens_T[:-1], points, config)
        teacher, said = jax.nn.log_softmax(teacher), map(jax.nn.log_softmax, said)
        return sum(jnp.sum(jnp.exp(teacher) * (teacher - x), axis=-1).mean() for x in said)

    return jax.vmap(of_text)(tokens_BT).mean()


def tune(heads, backbone, batches, points, config, learning_rate):
    """2. Tune, in one pass over batches int32 [B, T]. The gradient is asked for heads alone."""
    schedule = optax.cosine_decay_schedule(learning_rate, len(batches), alpha=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, 0.9, 0.99))

    @jax.jit
    def step(heads, state, tokens_BT):
        value, gradients = jax.value_and_grad(loss)(heads, backbone, tokens_BT, points, config)
        updates, state = optimizer.update(gradients, state, heads)
        return optax.apply_updates(heads, updates), state, value

    state = optimizer.init(heads)
    for batch in batches:
        heads, state, value = step(heads, state, batch)
        print(f"loss {value:.3f}", end="\r")
    return heads


def record(heads, backbone, texts, points, config):
    """(how sure each exit is [E, N], whether it says what the full model says [E, N])."""

    @jax.jit
    def of_text(tokens_T):
        *said, last = all_logits(heads, backbone, tokens_T[:-1], points, config)
        sure = jnp.stack([jax.nn.softmax(x).max(-1) for x in said])
        return sure, jnp.stack([x.argmax(-1) == last.argmax(-1) for x in said])

    parts = [of_text(text) for text in texts]
    return tuple(np.concatenate(part, axis=1) for part in zip(*parts, strict=True))


def threshold_at(sure_N, right_N, level):
    """The lowest score from which on a share `level` is right; inf where there is none."""
    order = np.argsort(-sure_N, kind="stable")
    falling, accuracy = sure_N[order], np.cumsum(right_N[order]) / (1 + np.arange(len(order)))
    ends = np.append(falling[1:] != falling[:-1], True)  # equal scores leave together
    reached = np.flatnonzero(ends & (accuracy >= level))
    return falling[reached[-1]] if len(reached) else np.inf


def calibrate(sure_EN, right_EN, epsilon):
    """3. Calibrate: thresholds [E] with which, of all that leave early, a share ε is right.

    What reaches a deep exit is what the exits before found hard. So the heads share a level that
    may be above ε: the lowest at which all together keep it.
    """
    for level in np.arange(1, 1001) / 1000:
        if level < epsilon:
            continue
        pairs = zip(sure_EN, right_EN, strict=True)
        thresholds = np.array([threshold_at(*pair, level) for pair in pairs], np.float32)
        leaves = sure_EN >= thresholds[:, None]
        first, early = leaves.argmax(0), leaves.any(0)
        right = right_EN[first, np.arange(len(first))][early]
        if not right.size or right.mean() >= epsilon:
            return thresholds
    raise AssertionError("at the level 1, all are right")


class Decode(NamedTuple):
    """A text in the making. Its newest token has not been read yet."""

    tokens_S: jax.Array
    depths_S: jax.Array  # blocks run for each token
    length: jax.Array
    cache: tuple[Rows, ...]  # of each block, [S, K, d]


def decode(heads, backbone, thresholds, prompt, new, points, config):
    """4. Decode: (`new` tokens after the prompt, greedy; the blocks that each took)."""
    heads_E = [heads[str(point)] for point in points]
    edges = (0, *points, config.depth)
    slots, length = len(prompt) + new, len(prompt)

    def written(cache, start, rows):
        """Rows go into the cache here, outside all branches: what a branch returns is copied."""
        return tuple(
            jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), *pair)
            for pair in zip(cache, rows, strict=True)
        )

    def first(prompt_T):
        """The prompt at full depth, and the first token."""
        hidden, rows = run_blocks(backbone, (0, config.depth), *started(backbone, prompt_T), config)
        empty = jnp.zeros((slots, config.kv_heads, config.head_dim))
        cache = written((Rows(empty, empty),) * config.depth, 0, rows)
        token = logits_of(own_end(backbone), hidden[-1], config).argmax()
        tokens = jnp.zeros(slots, jnp.int32).at[:length].set(prompt_T).at[length].set(token)
        depths = jnp.zeros(slots, jnp.int32).at[length].set(config.depth)
        return Decode(tokens, depths, jnp.int32(length + 1), cache)

    def step(state: Decode) -> Decode:
        at = state.length - 1
        hidden = backbone["embedding"]["embedding"][state.tokens_S[at]][None]
        left, token, depth = False, jnp.int32(0), jnp.int32(config.depth)
        rows = []
        for e, blocks in enumerate(zip(edges[:-1], edges[1:], strict=True)):

            def run(hidden, blocks=blocks):
                visible = jnp.append(jnp.arange(slots) < at, True)[None]
                cache = state.cache
                return run_blocks(backbone, blocks, hidden, at[None], visible, config, cache)

            def skip(hidden, blocks=blocks):
                """Later tokens look at this position in every block, so rows there must be. They
                are made of the state that it left with (CALM, Schuster et al. 2022)."""
                skipped = (backbone["blocks"][str(i)] for i in range(*blocks))
                return hidden, [rows_of(block, hidden, at[None], config) for block in skipped]

            hidden, found = jax.lax.cond(left, skip, run, hidden)
            rows += found

            def ask(hidden, e=e):
                head = heads_E[e] if e < len(points) else own_end(backbone)
                said = logits_of(head, hidden[0], config)
                sure = jax.nn.softmax(said).max() >= thresholds[e] if e < len(points) else True
                return jnp.bool(sure), said.argmax().astype(jnp.int32)

            leaves, said = jax.lax.cond(
                left, lambda _: (jnp.bool(False), jnp.int32(0)), ask, hidden
            )
            token, depth = jnp.where(leaves, said, token), jnp.where(leaves, blocks[1], depth)
            left |= leaves
        return Decode(
            state.tokens_S.at[state.length].set(token),
            state.depths_S.at[state.length].set(depth),
            state.length + 1,
            written(state.cache, at, rows),
        )

    @jax.jit
    def answered(prompt_T):
        return jax.lax.while_loop(lambda state: state.length < slots, step, first(prompt_T))

    state = answered(jnp.asarray(prompt, jnp.int32))
    return np.asarray(state.tokens_S[length:]), np.asarray(state.depths_S[length:])


def by_hand(model, batches, held_out, prompt, points, learning_rate=1e-3, epsilon=0.9, new=24):
    """(tokens, depths, the heads, the thresholds) by what stands above."""
    backbone, config = model.params["backbone"], model.static.config
    heads = tune(attach(backbone, points), backbone, batches, points, config, learning_rate)
    thresholds = calibrate(*record(heads, backbone, held_out, points, config), epsilon)
    tokens, depths = decode(heads, backbone, thresholds, prompt, new, points, config)
    return tokens, depths, heads, thresholds


def by_library(model, batches, held_out, prompt, points, learning_rate=1e-3, epsilon=0.9, new=24):
    """(tokens, depths, the tuned model with its policy)."""
    model = ee.attach(model, ee.ExitConfig(points, head="norm"))
    how = {"steps": len(batches), "learning_rate": learning_rate, "progress": False}
    model = ee.tune(model, batches, **how)
    model = ee.calibrate(model, [text[None] for text in held_out], epsilon=epsilon)
    (answer,) = ee.generate(model, [prompt], max_new_tokens=new)
    return answer.tokens, answer.depths, model


def main(source, points=(2, 4)):
    model = ee.load(source)
    text = model.tokenizer.encode(ee.__doc__ * 12)
    rows = np.array(text[: len(text) // 64 * 64], np.int32).reshape(-1, 64)
    asked = model, list(rows[:-8, None]), rows[-8:], text[:16], points
    for tokens, depths, *_ in (by_hand(*asked), by_library(*asked)):
        print(repr(model.tokenizer.decode(tokens)), "with", depths.mean().round(2), "blocks each")


if __name__ == "__main__":
    main(sys.argv[1])
