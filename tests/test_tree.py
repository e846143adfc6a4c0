import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit import tree

NAMES = st.text("abz09_-.", min_size=1, max_size=3)
LEAVES = st.tuples(
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(["float32", "int32", "bool", "bfloat16", "float16"]),
).map(lambda spec: np.ones(spec[0], jnp.dtype(spec[1])))
TREES = st.recursive(
    LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=6
).filter(lambda node: isinstance(node, dict))

PARAMS = {
    "backbone": {"blocks": {"0": {"kernel": np.arange(6.0).reshape(2, 3)}}},
    "exits": {"2": {"scale": np.ones(3, np.float32), "bias": np.float32(2)}},
}


def set_leaf(params, path, leaf):
    changed = copy.deepcopy(params)
    *parents, name = path.split("/")
    node = changed
    for parent in parents:
        node = node[parent]
    node[name] = leaf
    return changed


@settings(max_examples=50, deadline=None)
@given(TREES)
def test_flattened_trees_come_back(params):
    flat = tree.flatten(params)
    back = tree.unflatten(flat)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    # The very leaves, in the order that jax gives them: `shardings` relies on it.
    for a, b, c in zip(flat.values(), jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert a is b is c


def test_paths_are_joined_by_slashes():
    assert list(tree.flatten(PARAMS)) == [
        "backbone/blocks/0/kernel",
        "exits/2/bias",
        "exits/2/scale",
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": [np.ones(2)]}, r"nested dicts.*\['a'\]\[0\]"),
        ({"a": {3: np.ones(2)}}, r"\['a'\]\[3\]"),
    ],
    ids=["list", "int key"],
)
def test_other_containers_are_refused(params, message):
    with pytest.raises(TypeError, match=message):
        tree.flatten(params)


def test_the_first_matching_rule_wins():
    rules = [(r"0/kernel$", "first"), (r"kernel$", "second"), (r"^exits/", "third")]
    assert tree.match(rules, "backbone/blocks/0/kernel") == "first"
    assert tree.match(rules, "exits/1/kernel") == "second"
    assert tree.match(reversed(rules), "exits/0/kernel") == "third"


def test_a_missing_rule_names_the_parameter():
    with pytest.raises(KeyError, match="no rule matches parameter 'exits/2/bias'"):
        tree.match([("kernel$", 0)], "exits/2/bias")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_one_change_gives_another_fingerprint(data):
    path = data.draw(st.sampled_from(sorted(tree.flatten(PARAMS))))
    leaf = tree.flatten(PARAMS)[path]
    kind = data.draw(st.sampled_from(["value", "dtype", "shape", "path", "dropped"]))
    if kind == "value":
        # The least change there is: one bit.
        raw = bytearray(leaf.tobytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changed = set_leaf(PARAMS, path, np.frombuffer(raw, leaf.dtype).reshape(leaf.shape))
    elif kind == "dtype":  # the same bytes, read as another type
        changed = set_leaf(PARAMS, path, leaf.view(f"i{leaf.dtype.itemsize}"))
    elif kind == "shape":
        changed = set_leaf(PARAMS, path, leaf[..., None])
    else:
        flat = tree.flatten(PARAMS)
        moved = flat.pop(path)
        if kind == "path":
            flat[path + "x"] = moved
        changed = tree.unflatten(flat)
    assert tree.fingerprint(changed) != tree.fingerprint(PARAMS)


def test_the_fingerprint_is_of_values_not_of_containers():
    reordered = {"exits": PARAMS["exits"], "backbone": PARAMS["backbone"]}
    assert tree.fingerprint(reordered) == tree.fingerprint(PARAMS)
    strided = set_leaf(PARAMS, "backbone/blocks/0/kernel", np.arange(6.0).reshape(3, 2).T)
    straight = set_leaf(strided, "backbone/blocks/0/kernel", np.arange(6.0).reshape(3, 2).T.copy())
    assert tree.fingerprint(strided) == tree.fingerprint(straight)
    weights = {"a": np.arange(5, dtype=jnp.bfloat16)}
    assert tree.fingerprint(jax.tree.map(jnp.asarray, weights)) == tree.fingerprint(weights)


def test_size_in_bytes_needs_no_arrays():
    shapes = {"a": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "b": {"c": np.zeros((), np.int32)}}
    assert tree.size_in_bytes(shapes) == 34
