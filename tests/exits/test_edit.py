import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import TINY, build
from early_exit import policy as policies
from early_exit import tree
from early_exit.exits import edit

KINDS = TINY.head_kinds

TOKENS = jnp.array([[7, 3, 52, 11, 29, 0, 60, 3], [1, 2, 3, 4, 5, 6, 7, 8]])
KEY = jax.random.key(5)
EDITS = {
    "add": lambda model, params: edit.add(model, params, (5, 1), KEY, "random"),
    "move": lambda model, params: edit.move(model, params, {2: 3}),
    "swap": lambda model, params: edit.move(model, params, {2: 4, 4: 2}),
    "drop": lambda model, params: edit.drop(model, params, (2,)),
}


def full_logits(model, params):
    @jax.jit
    def run(params):
        backbone = model.bind(params).backbone
        hidden, context = backbone.stem({"tokens": TOKENS})
        return backbone.readout(backbone.run_blocks(hidden, 0, model.config.depth, context))

    return run(params)


def same(a, b):
    return tree.fingerprint(a) == tree.fingerprint(b)


@pytest.mark.parametrize("how", EDITS)
def test_the_full_model_and_the_given_parameters_stay(how):
    model, params = build(classes=7)
    before, points = tree.fingerprint(params), model.exits.points
    edited, new = EDITS[how](model, params)
    np.testing.assert_array_equal(full_logits(edited, new), full_logits(model, params))
    assert same(new["backbone"], params["backbone"])
    np.testing.assert_array_equal(new["token_ids"], params["token_ids"], strict=True)
    assert tree.fingerprint(params) == before and model.exits.points == points


@pytest.mark.parametrize("how", EDITS)
def test_the_edited_model_is_one_that_could_have_been_made_so(how):
    model, params = build(head="layer", output="shared", classes=7)
    edited, new = EDITS[how](model, params)
    assert list(edited.exits.points) == sorted(map(int, new["exits"]))
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), new["exits"])
    assert described == edited.abstract_exits()
    assert (edited.exits.head, edited.exits.output, edited.exits.classes) == ("layer", "shared", 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["copy", "random"])
def test_added_exits_start_like_any_and_the_others_stay(kind, source):
    model, params = build(head=kind)
    edited, new = edit.add(model, params, (3, 5), KEY, source)
    assert edited.exits.points == (2, 3, 4, 5)
    afresh = edited.init_exits(KEY, params["backbone"], source, None)
    for point in ("3", "5"):
        assert same(new["exits"][point], afresh[point])
    for point in ("2", "4"):
        assert same(new["exits"][point], params["exits"][point])


def test_moved_heads_are_the_same_heads_elsewhere(tiny):
    model, params = tiny
    edited, new = edit.move(model, params, {2: 5})
    assert edited.exits.points == (4, 5)
    assert same(new["exits"]["5"], params["exits"]["2"])
    assert same(new["exits"]["4"], params["exits"]["4"])
    swapped, new = edit.move(model, params, {2: 4, 4: 2})
    assert swapped == model
    assert same(new["exits"]["4"], params["exits"]["2"])
    assert same(new["exits"]["2"], params["exits"]["4"])


def test_dropping_what_was_added_gives_the_model_back(tiny):
    model, params = tiny
    back, same_params = edit.drop(*edit.add(model, params, (1, 3), KEY, "copy"), (1, 3))
    assert back == model and same(same_params, params)


def test_an_exit_policy_does_not_outlive_the_change(tiny):
    """One of other depths or number is refused; one of as many is told apart by the heads."""
    model, params = tiny
    policy = policies.never(2)
    for how in ("add", "drop"):
        edited, _ = EDITS[how](model, params)
        with pytest.raises(ValueError, match="the policy has 2 thresholds but the model has"):
            policy.check(edited.exit_depths)
    for how in EDITS:
        _, new = EDITS[how](model, params)
        assert not same(new["exits"], params["exits"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, p: edit.add(m, p, (1, 2), KEY, "copy"), r"exits after blocks \[2\] already"),
        (lambda m, p: edit.add(m, p, (6,), KEY, "copy"), r"\[6\] lie outside 1…5"),
        (lambda m, p: edit.add(m, p, (0,), KEY, "copy"), r"\[0\] lie outside 1…5"),
        (lambda m, p: edit.add(m, p, (3, 3), KEY, "copy"), "without repeats"),
        (lambda m, p: edit.add(m, p, (3,), KEY, "zeros"), "unknown init 'zeros'"),
        (lambda m, p: edit.move(m, p, {3: 5}), r"no exit after blocks \[3\]; .* \(2, 4\)"),
        (lambda m, p: edit.move(m, p, {2: 4}), r"two exits would stand after blocks \[4\]"),
        (lambda m, p: edit.move(m, p, {2: 6}), r"\[6\] lie outside 1…5"),
        (lambda m, p: edit.drop(m, p, (1, 2)), r"no exit after blocks \[1\]"),
        (lambda m, p: edit.drop(m, p, (2, 4)), "no exit would be left"),
    ],
)
def test_what_cannot_be_edited_is_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        change(*tiny)
