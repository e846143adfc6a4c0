import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from early_exit.pretrained.table import (
    CONV,
    STORED,
    TRANSPOSED,
    Entry,
    Fused,
    FusedByHead,
    empty,
    fits,
    prefixed,
    stored_shape,
)

ENTRIES = [Entry("model.a", ("a",)), Entry("model.b", ("b",)), Entry("head", ("head",))]


@st.composite
def layouts(draw):
    """(layout, a tensor that it splits)."""
    size = st.integers(1, 4)
    rank = draw(st.integers(1, 4))
    shape = [draw(size) for _ in range(rank)]
    then = draw(st.sampled_from({2: [STORED, TRANSPOSED], 4: [STORED, CONV]}.get(rank, [STORED])))
    kind = draw(st.sampled_from(["plain", "fused", "by head"]))
    if kind == "plain":
        layout = then
    elif kind == "fused":
        axis = draw(st.integers(0, rank - 1))
        sizes = tuple(draw(st.lists(size, min_size=1, max_size=3)))
        shape[axis] = sum(sizes)
        layout = Fused(sizes, axis, then)
    else:
        heads, parts = draw(size), draw(size)
        shape[0] *= heads * parts
        layout = FusedByHead(heads, parts, then)
    return layout, np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@hypothesis.settings(deadline=None)
@hypothesis.given(layouts())
def test_join_undoes_split(case):
    layout, stored = case
    parts = layout.split(stored)
    np.testing.assert_array_equal(layout.join(parts), stored, strict=True)
    # Every value is in exactly one part.
    values = np.concatenate([part.ravel() for part in parts])
    np.testing.assert_array_equal(np.sort(values), stored.ravel())
    entry = Entry("x", tuple(map(str, range(len(parts)))), layout)
    shapes = [part.shape for part in parts]
    assert fits(entry, stored.shape, shapes) and stored_shape(entry, shapes) == stored.shape


def test_linear_layers_and_convolutions():
    x, weight = np.random.default_rng(0).normal(size=(2, 3)), np.arange(12.0).reshape(4, 3)
    (kernel,) = TRANSPOSED.split(weight)
    np.testing.assert_allclose(x @ kernel, np.einsum("bi,oi->bo", x, weight))
    assert CONV.split(np.zeros((8, 3, 5, 7)))[0].shape == (5, 7, 3, 8)


def test_gpt2_stores_query_key_and_value_side_by_side():
    query, key, value = np.random.default_rng(0).normal(size=(3, 4, 6))
    layout = Fused((6, 6, 6), axis=1)
    for got, want in zip(
        layout.split(np.hstack([query, key, value])), (query, key, value), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_neox_stores_query_key_and_value_head_by_head():
    heads, head_dim, width = 3, 2, 5
    parts = np.random.default_rng(0).normal(size=(3, heads, head_dim, width))
    rows = [parts[part, head] for head in range(heads) for part in range(3)]
    split = FusedByHead(heads, 3, TRANSPOSED).split(np.vstack(rows))
    for got, part in zip(split, parts, strict=True):
        np.testing.assert_array_equal(got, part.reshape(heads * head_dim, width).T)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (STORED, (3,)),
        (STORED, (3, 4, 1)),
        (TRANSPOSED, (4, 4)),
        (TRANSPOSED, (12,)),
        (TRANSPOSED, ()),
        (CONV, (3, 4)),
        (Fused((2, 2), 0), (5, 4)),
        (Fused((2, 2), 1), (4,)),
        (Fused((3, 3), 0), (6, 5)),
        (FusedByHead(2, 2), (6, 4)),
        (FusedByHead(2, 2), ()),
    ],
)
def test_tensors_of_another_shape_do_not_fit(layout, shape):
    assert not fits(Entry("x", ("a", "b"), layout), shape, [(3, 4)])


def test_checking_a_shape_takes_no_memory():
    terabytes = (1 << 20, 1 << 20)
    for layout, parts in ((TRANSPOSED, 1), (Fused((1 << 19,) * 2, 0), 2), (FusedByHead(4, 2), 2)):
        shapes = [part.shape for part in layout.split(empty(terabytes))]
        assert len(shapes) == parts and fits(Entry("x", (), layout), terabytes, shapes)


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (["model.a", "model.b", "head"], ["model.a", "model.b", "head"]),
        (["a", "b", "head"], ["a", "b", "head"]),
        (["net.a", "head"], ["net.a", "net.b", "head"]),
        (["head"], ["model.a", "model.b", "head"]),
        (["a", "model.a", "model.b"], ["model.a", "model.b", "head"]),
    ],
)
def test_the_prefix_is_the_one_that_most_tensors_have(stored, found):
    entries = prefixed(ENTRIES, ("model.", "", "net."), stored)
    assert [entry.name for entry in entries] == found
    assert [entry.paths for entry in entries] == [("a",), ("b",), ("head",)]
