import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import TINY, build
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.decoder import DecoderConfig
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit

KINDS = TINY.head_kinds

TOKENS = jnp.array([[7, 3, 52, 11, 29, 0, 60, 3], [1, 2, 3, 4, 5, 6, 7, 8]])
IDS = jnp.array([9, 60, 0, 33, 12], jnp.int32)


def exits_of(model, backbone, source="copy", seed=0, token_ids=None):
    return model.init_exits(jax.random.key(seed), backbone, source, token_ids)


def all_logits(model, params):
    """Logits of every exit and of the full model."""
    bound = model.bind(params)
    hidden, context = bound.backbone.stem({"tokens": TOKENS})
    states = list(bound.hidden_at_exits(hidden, context, model.exit_depths.tolist()))
    exits = [
        base.logits(head.features(h, context)[0], table)
        for head, h, table in zip(bound.heads, states, bound.exit_tables(), strict=False)
    ]
    return exits, bound.backbone.readout(states[-1])


def test_segments_cover_every_block_once():
    model, _ = build(points=(1, 2, 5))
    assert model.segments == ((0, 1), (1, 2), (2, 5), (5, 6))
    assert model.exit_depths.tolist() == [1, 2, 5, 6]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_copied_weights_are_the_backbones_bit_for_bit(kind, tied):
    config = DecoderConfig(**{**vars(TINY), "tied": tied})
    model, params = build(config, head=kind)
    backbone = tree.flatten(params["backbone"])
    for point, head in exits_of(model, params["backbone"]).items():
        sources = {
            "mlp_norm/": f"blocks/{int(point) - 1}/mlp_norm/",  # of the block before the exit
            "mlp/": f"blocks/{int(point) - 1}/mlp/",
            "block/": "blocks/5/",  # the last
            "norm/": "final_norm/",
            "output/": "embedding/" if tied else "output/",
        }
        for path, leaf in tree.flatten(head).items():
            part = path.partition("/")[0] + "/"
            source = backbone[sources[part] + path.removeprefix(part)]
            np.testing.assert_array_equal(leaf, source, strict=True)


@pytest.mark.parametrize("output", ["own", "shared"])
def test_reduced_outputs_are_copied_by_token(output):
    model, params = build(output=output, classes=len(IDS))
    table = np.asarray(params["backbone"]["embedding"]["embedding"])
    copied = exits_of(model, params["backbone"], token_ids=IDS)
    bound = model.bind(params | {"exits": copied, "token_ids": IDS})
    others = np.delete(table, IDS, axis=0)
    for rows in bound.exit_tables():
        np.testing.assert_array_equal(rows[:-1], table[IDS])
        np.testing.assert_allclose(rows[-1], others.mean(0), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_own_their_memory(kind):
    """Tuning donates the heads' buffers; the backbone must not go with them."""
    model, params = build(head=kind)
    before = tree.fingerprint(params["backbone"])
    copied = exits_of(model, params["backbone"])
    update = jax.jit(lambda exits: jax.tree.map(lambda x: x * 0 - 1, exits), donate_argnums=0)
    donated = update(copied)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copied))
    for leaf in jax.tree.leaves(donated):
        leaf.delete()
    assert tree.fingerprint(params["backbone"]) == before


def test_a_copied_norm_head_before_an_idle_block_is_the_final_exit():
    model, params = build(points=(3, 5), head="norm")
    for part, kernel in (("attention", "output"), ("mlp", "down")):
        last = params["backbone"]["blocks"]["5"][part][kernel]
        last["kernel"] = jnp.zeros_like(last["kernel"])
    params["exits"] = exits_of(model, params["backbone"])
    (_, at_exit), final = all_logits(model, params)
    np.testing.assert_array_equal(at_exit, final)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_follow_from_the_key_and_the_exit(kind):
    model, params = build(head=kind)
    first = exits_of(model, params["backbone"], "random", seed=3)
    again = exits_of(model, params["backbone"], "random", seed=3)
    other = exits_of(model, params["backbone"], "random", seed=4)
    assert tree.fingerprint(first) == tree.fingerprint(again)
    for path, leaf in tree.flatten(first["2"]).items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
            continue
        assert (leaf != tree.flatten(first["4"])[path]).mean() > 0.99
        assert (leaf != tree.flatten(other["2"])[path]).mean() > 0.99
        residual = path.endswith(("attention/output/kernel", "down/kernel"))
        deviation = 0.02 / (2 * model.config.depth) ** 0.5 if residual else 0.02
        # Five standard errors of a standard deviation from so many draws.
        assert abs(leaf.std() / deviation - 1) < 5 / (2 * leaf.size) ** 0.5


@pytest.mark.parametrize("source", ["copy", "random"])
def test_gates_are_drawn_whatever_the_rest_starts_from(source):
    """The rest is as without gates: a comparison with and without starts from the same heads."""
    gated, params = build(head="mlp", gate=True)
    bare, _ = build(head="mlp")
    first = exits_of(gated, params["backbone"], source, seed=3)
    again = exits_of(gated, params["backbone"], source, seed=3)
    other = exits_of(gated, params["backbone"], source, seed=4)
    assert tree.fingerprint(first) == tree.fingerprint(again)
    gate, elsewhere, deeper = (
        tree.flatten(head["gate"]) for head in (first["2"], other["2"], first["4"])
    )
    for path, leaf in gate.items():
        if path.endswith("kernel"):
            assert (leaf != elsewhere[path]).mean() > 0.99
            assert (leaf != deeper[path]).mean() > 0.99
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")))
    for point, head in exits_of(bare, params["backbone"], source, seed=3).items():
        rest = {name: part for name, part in first[point].items() if name != "gate"}
        assert tree.fingerprint(rest) == tree.fingerprint(head)


def test_one_exit_draws_the_same_whatever_others_there_are():
    one, params = build(points=(4,))
    two, _ = build(points=(2, 4))
    a = exits_of(one, params["backbone"], "random")["4"]
    b = exits_of(two, params["backbone"], "random")["4"]
    assert tree.fingerprint(a) == tree.fingerprint(b)


@pytest.mark.parametrize("source", ["copy", "random"])
def test_heads_have_the_backbones_dtype(source):
    model, params = build(head="layer", classes=len(IDS), gate=True)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["backbone"])
    exits = exits_of(model, half, source, token_ids=IDS)
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), exits)
    assert described == model.abstract_exits(jnp.bfloat16)


def test_unknown_init(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="unknown init 'zeros'; choose one of copy, random"):
        exits_of(model, params["backbone"], "zeros")


@pytest.mark.parametrize(
    ("classes", "token_ids", "message"),
    [
        (0, IDS, "exits.classes=0 but 5 token ids were given"),
        (20, IDS, "exits.classes=20 but 5 token ids were given"),
        (20, None, "exits.classes=20 but 0 token ids were given"),
    ],
)
def test_token_ids_must_be_as_many_as_classes(tiny, classes, token_ids, message):
    model = MultiExit(TINY, ExitConfig((2, 4), classes=classes))
    for source in ("copy", "random"):
        with pytest.raises(ValueError, match=message):
            exits_of(model, tiny[1]["backbone"], source, token_ids=token_ids)


def test_adding_exits_leaves_the_full_models_logits_alone(tiny):
    _, params = tiny
    definition, _ = base.abstract(TINY.build)

    @jax.jit
    def without_exits(backbone):
        bare = base.merge(definition, backbone)
        hidden, context = bare.stem({"tokens": TOKENS})
        return bare.readout(bare.run_blocks(hidden, 0, TINY.depth, context))

    want = without_exits(params["backbone"])
    for options in (
        {"points": (1, 2, 3, 4, 5), "head": "layer"},
        {"points": (3,), "head": "mlp", "classes": 7, "output": "shared", "gate": True},
    ):
        model, other = build(**options)
        other["backbone"] = params["backbone"]
        exits, got = jax.jit(lambda params, model=model: all_logits(model, params))(other)
        assert len(exits) == len(model.exits.points)
        np.testing.assert_array_equal(got, want)


def test_no_block_runs_deeper_than_asked(tiny):
    """Broken deeper blocks do not reach the exits before them."""
    model, params = tiny
    blocks = params["backbone"]["blocks"]
    broken = {**blocks, "4": jax.tree.map(lambda x: x * jnp.nan, blocks["4"])}
    params = {**params, "backbone": {**params["backbone"], "blocks": broken}}
    exits, final = all_logits(model, params)
    assert all(jnp.isfinite(x).all() for x in exits) and jnp.isnan(final).all()
