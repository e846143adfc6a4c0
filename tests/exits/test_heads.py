import jax
import numpy as np
import pytest
from flax import nnx

from conftest import TINY, build
from early_exit import tree
from early_exit.backbones import base
from early_exit.backbones.resnet import ResNetConfig
from early_exit.exits.heads import OUTPUTS, ExitConfig, Gate, Head

KINDS = TINY.head_kinds

D, F, V = TINY.width, TINY.mlp_width, TINY.vocab_size
QUERY, KEY = TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim
NORM = {"scale": (D,)}
MLP = {
    "gate/kernel": (D, F),
    "up/kernel": (D, F),
    "down/kernel": (F, D),
}
BLOCK = {
    "attention_norm/scale": (D,),
    "attention/query/kernel": (D, QUERY),
    "attention/key/kernel": (D, KEY),
    "attention/value/kernel": (D, KEY),
    "attention/output/kernel": (QUERY, D),
    "mlp_norm/scale": (D,),
    **{f"mlp/{name}": shape for name, shape in MLP.items()},
}
PARTS = {
    "embedding": {},
    "norm": {"norm": NORM},
    "mlp": {"mlp_norm": NORM, "mlp": MLP, "norm": NORM},
    "layer": {"block": BLOCK, "norm": NORM},
}
# Rows of a head's own matrix; "none of these" is never in the backbone's.
ROWS = {("own", 0): V, ("own", 20): 21, ("shared", 0): 0, ("shared", 20): 1}


GATE = {
    "gate/norm/scale": (D,),
    "gate/hidden/kernel": (D, Gate.WIDTH),
    "gate/hidden/bias": (Gate.WIDTH,),
    "gate/logit/kernel": (Gate.WIDTH, 1),
    "gate/logit/bias": (1,),
}


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("classes", [0, 20])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_has_exactly_its_parts(kind, output, classes, gate):
    exits = ExitConfig((2,), head=kind, output=output, classes=classes, gate=gate)
    _, params = base.abstract(lambda rngs: Head(TINY, exits, 2, rngs=rngs))
    want = {
        f"{part}/{name}": shape
        for part, shapes in PARTS[kind].items()
        for name, shape in shapes.items()
    }
    rows = ROWS[output, classes]
    if rows:
        want["output/embedding"] = (rows, D)
    if gate:
        want |= GATE
    assert {path: leaf.shape for path, leaf in tree.flatten(params).items()} == want


@pytest.mark.parametrize("kind", KINDS)
def test_only_layer_heads_look_at_other_positions(kind):
    """And these only at earlier ones."""
    model, params = build(head=kind)
    bound = model.bind(params)
    hidden, context = bound.backbone.stem({"tokens": np.arange(5)[None]})

    def feature_sums(hidden):
        features, rows = bound.heads[0].features(hidden, context)
        return features.sum(-1)[0], rows

    slopes, rows = jax.jit(jax.jacobian(feature_sums, has_aux=True))(hidden)
    influence = np.abs(slopes[:, 0]).sum(-1) > 0  # [T, T]
    want = np.tri(5) if kind == "layer" else np.eye(5)
    np.testing.assert_array_equal(influence, want)
    assert (rows is not None) == bound.heads[0].has_block == (kind == "layer")


def test_a_copied_layer_head_is_the_last_block_and_the_final_norm():
    model, params = build(head="layer")
    copied = model.init_exits(jax.random.key(0), params["backbone"], "copy", None)
    bound = model.bind(params | {"exits": copied})
    hidden, context = bound.backbone.stem({"tokens": np.arange(7)[None]})
    features, _ = bound.heads[0].features(hidden, context)
    want = bound.backbone.features(bound.backbone.run_blocks(hidden, 5, 6, context))
    assert (features == want).all()


def test_a_gate_judges_every_position_by_its_hidden_state_alone():
    model, params = build(gate=True)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, D)) * 30
    head, other = model.bind(params).heads
    scores = head.gate_score(hidden)
    assert scores.shape == (2, 5) and scores.dtype == np.float32
    assert ((scores >= 0) & (scores <= 1)).all()
    alone = [[float(head.gate_score(h)) for h in row] for row in hidden]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    # The gate has a norm of its own: it sees where a state points, not how long it is.
    np.testing.assert_allclose(head.gate_score(hidden * 100), scores, atol=1e-3)
    assert np.ptp(scores) > 0.1 and not np.allclose(other.gate_score(hidden), scores, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "tied"}, "unknown output 'tied'; choose one of shared, own"),
        ({"points": (4, 2)}, r"exit points must rise without repeats, not \(4, 2\)"),
        ({"points": (2, 2)}, r"exit points must rise without repeats, not \(2, 2\)"),
        ({"classes": -1}, r"exits.classes must be 0 \(all\) or positive, not -1"),
    ],
)
def test_descriptions_that_make_no_exits(options, message):
    with pytest.raises(ValueError, match=message):
        ExitConfig(**{"points": (2, 4)} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "mpl"}, "carries no head 'mpl'; choose one of embedding, norm, mlp, layer"),
        ({"cascade": True}, "exits.cascade and exits.ensemble are for classifiers"),
        ({"points": (0, 3)}, r"exit points \[0\] lie outside 1…5: the backbone has 6 blocks"),
        ({"points": (-1, 3, 6, 9)}, r"exit points \[-1, 6, 9\] lie outside 1…5"),
        ({"points": (6,)}, "its own readout is the exit after block 6"),
        ({"classes": V}, "exits.classes=61 is not below the vocabulary of 61; use classes=0"),
    ],
)
def test_exits_that_do_not_fit_the_backbone(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_backbone_that_predicts_nothing_has_no_exits():
    with pytest.raises(ValueError, match="no output matrix.* give its config num_classes"):
        ExitConfig((1,), "linear").check(ResNetConfig.cifar(8, num_classes=0))


def test_every_block_but_the_last_may_have_an_exit():
    ExitConfig((1, 2, 3, 4, 5), classes=V - 1).check(TINY)


def test_parameters_are_all_there_is():
    """No stored RNG, cache or running statistics in any head."""
    for kind in KINDS:
        exits = ExitConfig((2,), head=kind, gate=True)
        head = nnx.eval_shape(lambda e=exits: Head(TINY, e, e.points[0], rngs=nnx.Rngs(0)))
        state = nnx.to_flat_state(nnx.state(head))
        assert {type(variable) for _, variable in state} == {nnx.Param}
