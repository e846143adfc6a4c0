"""Networks of somebody's own: whatever they are made of, pieces of them are the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import early_exit as ee
from early_exit import tree
from early_exit.backbones import base, identity
from early_exit.backbones.decoder import Decoder, DecoderConfig
from early_exit.cost import multiply_adds
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained import families

IMAGES = {"images": jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")}
ROWS = {"rows": jax.ShapeDtypeStruct((2, 5), "float32")}


class Conv(nnx.Module):
    """Of a width of its own, with statistics and dropout."""

    def __init__(self, inputs, outputs, stride, rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=stride, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.conv(x))))


class Net(nnx.Module):
    """Blocks in two lists; a norm behind the mean."""

    def __init__(self, rngs):
        self.entry = Conv(3, 4, 1, rngs)
        self.stages = nnx.Dict(
            first=nnx.List([Conv(4, 4, 1, rngs), Conv(4, 6, 2, rngs)]),
            second=nnx.Sequential(Conv(6, 6, 1, rngs), Conv(6, 8, 2, rngs)),
        )
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def summary(self, x):
        return self.norm(x.mean((1, 2)))

    def __call__(self, images):
        x = self.entry(images)
        for block in (*self.stages.first, *self.stages.second.layers):
            x = block(x)
        return self.head(self.summary(x))


class Part(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        return x + linen.Dense(x.shape[-1])(linen.tanh(linen.Dense(self.width)(x)))


class Whole(linen.Module):
    """A Linen network whose parts are methods."""

    def setup(self):
        self.entry, self.head = linen.Dense(6), linen.Dense(3)
        self.parts = [Part(7), Part(8), Part(9)]

    def stem(self, inputs):
        return self.entry(inputs["rows"])

    def one(self, x):
        return self.parts[0](x)

    def two(self, x):
        return self.parts[1](x)

    def three(self, x):
        return self.parts[2](x)

    def __call__(self, inputs):
        return self.head(self.three(self.two(self.one(self.stem(inputs)))))


class Bridged(nnx.Module):
    """An NNX network whose parts are Linen."""

    def __init__(self, rngs):
        x = jnp.zeros((1, 6))
        self.entry = nnx.bridge.ToNNX(linen.Dense(6), rngs=rngs).lazy_init(jnp.zeros((1, 5)))
        self.parts = nnx.List(
            [nnx.bridge.ToNNX(Part(w), rngs=rngs).lazy_init(x) for w in (7, 8, 9)]
        )
        self.head = nnx.bridge.ToNNX(linen.Dense(3), rngs=rngs).lazy_init(x)

    def __call__(self, rows):
        x = self.entry(rows)
        for part in self.parts:
            x = part(x)
        return self.head(x)


def whole(rngs):
    inputs = {"rows": jnp.zeros((1, 5))}
    return nnx.bridge.ToNNX(Whole(), rngs=rngs).lazy_init(inputs)


class Attending(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(x, mask=mask)
        return x + nnx.gelu(self.up(x))


class Tagger(nnx.Module):
    """A classifier of texts with a mask for context, and a readout that needs it."""

    def __init__(self, rngs):
        self.words = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = nnx.List([Attending(rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.out = nnx.Linear(8, 2, use_bias=False, rngs=rngs)

    def stem(self, inputs):
        return self.words(inputs["tokens"]), inputs["mask"][:, None, None]

    def last(self, x, mask):
        return mean(self.norm(x), mask)

    def __call__(self, tokens, mask):
        x, mask = self.stem({"tokens": tokens, "mask": mask})
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.last(x, mask))


def mean(x, mask):
    real = mask[:, 0, 0, :, None]
    return (x * real).sum(1) / real.sum(1)


TEXTS = {
    "tokens": jax.ShapeDtypeStruct((2, 6), "int32"),
    "mask": jax.ShapeDtypeStruct((2, 6), "bool"),
}
LISTS = ("stages.first", "stages.second")
CASES = {
    "nnx": ee.wrap(Net, IMAGES, stem="entry", blocks=LISTS, output="head", features="summary"),
    "linen": ee.wrap(whole, ROWS, stem="stem", blocks=("one", "two", "three"), output="head"),
    "bridged": ee.wrap(Bridged, ROWS, stem="entry", blocks="parts", output="head"),
    "context": ee.wrap(
        Tagger, TEXTS, stem="stem", blocks="blocks", output="out", features="last", pooling=mean
    ),
}
RNG = np.random.default_rng(0)
GIVEN = {
    "images": RNG.normal(size=(2, 8, 8, 3)).astype(np.float32),
    "rows": RNG.normal(size=(2, 5)).astype(np.float32),
    "tokens": RNG.integers(0, 11, (2, 6), np.int32),
    "mask": np.arange(6) < np.array([[6], [3]]),
}


@pytest.fixture(autouse=True)
def as_flax_has_it():
    """Flax broadcasts as it likes."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(config, parameters, inputs, what the network itself says of them)."""
    config = CASES[request.param]
    network = config.places.make(nnx.Rngs(1))
    state = nnx.state(network, nnx.BatchStat)
    shifted = jax.tree.map(lambda x: x - np.float32(0.3), state)  # unlike a batch's
    nnx.update(network, shifted)
    params = config.params_of(network)
    inputs = {name: GIVEN[name] for name in config.places.shapes}
    network.eval()
    arguments = [inputs] if request.param == "linen" else inputs.values()
    with jax.numpy_rank_promotion("allow"):
        return config, params, inputs, np.asarray(network(*arguments))


def test_pieces_are_the_network(case):
    config, params, inputs, want = case
    definition, shapes = base.described(config)
    assert tree.shapes(params) == tree.shapes(shapes)
    model = base.merge(definition, params)
    hidden, context = model.stem(inputs)
    full = model.run_blocks(hidden, 0, config.depth, context)
    np.testing.assert_allclose(model.readout(full, context), want, atol=1e-5)
    for split in range(1, config.depth):
        part = model.run_blocks(hidden, 0, split, context)
        assert part.shape[-1] == config.at(split).width
        rest = model.run_blocks(part, split, config.depth, context)
        np.testing.assert_allclose(rest, full, atol=1e-5)
    assert np.abs(np.diff(want, axis=0)).max() > 1e-3


def test_a_network_comes_back_from_its_parameters(case):
    config, params, inputs, want = case
    again = config.params_of(config.network_of(params))
    assert tree.fingerprint(again) == tree.fingerprint(params)


def test_exits_stand_on_it_and_cost_what_they_cost(case):
    config, params, inputs, _ = case
    model = base.merge(base.described(config)[0], params)
    hidden, context = model.stem(inputs)
    states = [hidden := model.run_blocks(hidden, i, i + 1, context) for i in range(2)]
    for head in config.head_kinds:
        model = MultiExit(config, ExitConfig((1, 2), head, gate=True))
        exits = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), model.abstract_exits())
        bound, said = model.bind({"backbone": params, "exits": exits}), []
        for e, after in enumerate(states):
            said.append(bound.exit_logits(e, after, context, said))
            assert said[-1].shape == (2, config.num_classes)
            assert bound.heads[e].gate_score(after, context).shape == (2,)
    of = multiply_adds.backbone(config)
    own = [tree.size_in_bytes(params["blocks"][str(i)]) for i in range(config.depth)]
    assert [block.bytes for block in of.blocks] == own
    assert (np.diff(multiply_adds.leaving(model, of)) > 0).all()


def test_statistics_stay_where_the_rest_is_trained():
    config = CASES["nnx"]
    params = base.init(config, jax.random.key(0))
    definition, _ = base.described(config)

    @jax.grad
    def slope(params):
        model = base.merge(definition, params)
        hidden, context, moments = model.stem_training({"images": GIVEN["images"]})
        hidden, more = model.run_blocks_training(hidden, 0, 1, context)
        assert not moments and not more
        return jnp.square(hidden).sum()

    moved = {path for path, leaf in tree.flatten(slope(params)).items() if np.any(leaf != 0)}
    parts = ("conv/kernel", "conv/bias", "norm/scale", "norm/bias")
    assert moved == {f"{of}/{part}" for of in ("network/entry", "blocks/0") for part in parts}


def test_layers_of_one_width_are_copied_into_heads():
    config = CASES["context"]
    params = base.init(config, jax.random.key(0))
    model = ee.attach(ee.Model.of(config, params), ExitConfig((1,), "linear", output="shared"))
    assert not model.heads["1"]
    copied = MultiExit(CASES["bridged"], ExitConfig((2,), "linear"))
    own = base.init(CASES["bridged"], jax.random.key(0))
    heads = copied.init_exits(jax.random.key(0), own, "copy", None)
    np.testing.assert_array_equal(heads["2"]["output"]["embedding"], own["output"]["embedding"])


LLAMA = DecoderConfig(
    vocab_size=31, width=16, depth=3, heads=4, kv_heads=2, head_dim=4, mlp_width=20,
    context_length=64,
)  # fmt: skip


class Writer(nnx.Module):
    """A language model with the blocks of another, which fulfil the cached contract."""

    def __init__(self, rngs):
        self.inside = Decoder(LLAMA, rngs=rngs)

    def stem(self, inputs):
        return self.inside.stem(inputs)

    def last(self, hidden):
        return self.inside.final_norm(hidden)


class Plain(nnx.Module):
    """One without a cache: causal attention over the whole row."""

    def __init__(self, rngs):
        self.words = nnx.Embed(31, 8, rngs=rngs)
        self.blocks = nnx.List([Attending(rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def stem(self, inputs):
        tokens = inputs["tokens"]
        documents = inputs.get("documents", jnp.ones_like(tokens))
        same = documents[:, None, :, None] == documents[:, None, None]
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        return self.words(tokens), causal[None, None] & same


TOKENS = {"tokens": jax.ShapeDtypeStruct((1, 64), "int32")}
WRITER = ee.wrap(
    Writer, TOKENS, stem="stem", blocks="inside.blocks", output="inside.embedding",
    features="last", classifies=False,
)  # fmt: skip
PLAIN = ee.wrap(
    Plain, TOKENS, stem="stem", blocks="blocks", output="words", features="norm", classifies=False
)


def test_a_language_model_with_cached_blocks_is_decoded_from_as_the_one_it_is_made_of():
    inside = base.init(LLAMA, jax.random.key(0))
    inside = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, inside)
    flat = tree.flatten(inside)
    same = {leaf.ours: flat["/".join(leaf.theirs[1:])] for leaf in WRITER.plan.leaves}
    assert WRITER.decodes and WRITER.cached_rows(0) == LLAMA.cached_rows(0)
    assert WRITER.context_length == 64 and WRITER.vocab_size == 31
    exits = ExitConfig((1, 2), "embedding", output="shared")
    model = ee.attach(ee.Model.of(WRITER, tree.unflatten(same)), exits)
    (answer,) = ee.generate(model, [[1, 2, 3]], max_new_tokens=6)
    # What the other says of the whole row, without a cache.
    whole = base.merge(base.described(LLAMA)[0], inside)
    row = jnp.asarray([[1, 2, 3, *answer.tokens[:-1]]], jnp.int32)
    hidden, context = whole.stem({"tokens": row})
    said = whole.readout(whole.run_blocks(hidden, 0, 3, context)).argmax(-1)
    assert answer.tokens.tolist() == said[0, 2:].tolist() and len(set(answer.tokens.tolist())) > 1


def test_a_language_model_without_a_cache_gets_exits_over_whole_rows():
    params = base.init(PLAIN, jax.random.key(0))
    model = ee.attach(
        ee.Model.of(PLAIN, params), ExitConfig((1, 2), "norm", output="shared"), init="random"
    )
    batches = [np.random.default_rng(i).integers(0, 31, (2, 16)) for i in range(2)]
    tuned = ee.tune(model, batches, steps=2, progress=False)
    records = ee.record(tuned, batches)
    assert len(records.predictions) == 3 and records.predictions.max() < 31
    with pytest.raises(ValueError, match="blocks keep no cache.*CachedBlock"):
        ee.generate(tuned, [[1, 2, 3]], max_new_tokens=2)


def test_the_table_is_one_parameter_where_it_is_read_twice():
    paths = [leaf.ours for leaf in PLAIN.plan.leaves]
    assert paths.count("output/embedding") == 1 and not any("words" in path for path in paths)


def corner(hidden, context):
    return hidden[:, 0, 0]


def changed(config, **changes):
    """As `wrap` would be called with other arguments."""
    return dataclasses.replace(config, places=dataclasses.replace(config.places, **changes))


class Broadcast(Tagger):
    def stem(self, inputs):
        return self.words(inputs["tokens"]), jnp.ones((1, 1, 1, 6), bool)


class Strange(Net):
    """Things that no network here may have."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.counter = nnx.Variable(jnp.zeros((), jnp.int32))


class Shared(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.stages.first[0] = Conv(4, 4, 1, rngs)
        self.twice = nnx.List([self.stages.first[0], self.stages.first[0]])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("nnx", {"blocks": ("layers",)}, "no 'layers'; at its top it has entry, head, norm, stag"),
        ("nnx", {"stem": "entry.cnov"}, "no 'entry.cnov'"),
        ("nnx", {"blocks": ("entry", "stages.second.layers.7")}, "layers.7"),
        ("nnx", {"blocks": ()}, "needs inputs, and blocks to stop between"),
        ("nnx", {"blocks": ("stages.second",)}, "block 1 of the network does not run: "),
        ("nnx", {"output": "norm"}, r"'norm' is no linear layer .*it has bias \[8\], scale \[8\]"),
        ("nnx", {"output": "entry.conv"}, r"no linear layer .*kernel \[3, 3, 3, 4\]"),
        ("nnx", {"blocks": ("stages.first",), "features": ""}, r"reads \[B, 8\], but gets .*6"),
        ("nnx", {"pooling": "max"}, "unknown pooling 'max'; choose one of mean, first, or give a"),
        ("nnx", {"pooling": lambda x, context: x}, r"pooling makes \[2, 8, 8, 4\] of .* block 1;"),
        ("nnx", {"pooling": mean}, "pooling does not run after block 1: 'NoneType' object"),
        ("nnx", {"classifies": False}, "a language model reads tokens"),
        ("nnx", {"make": Strange}, "counter of the network is a Variable of int32, which is neit"),
        (
            "nnx",
            {"make": Shared, "blocks": ("twice", "stages.first.1", "stages.second")},
            "block 1 of the network has no weights of its own",
        ),
        ("nnx", {"blocks": ("stages",)}, "'stages' .* keeps no order; name its parts, first"),
        ("context", {"make": Broadcast}, r"context of the shapes \[1, 1, 1, 6\], which does"),
        ("context", {"classifies": False, "stem": "words"}, "is a submodule, which gets the"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_at_once(config, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(CASES[config], **changes)


def test_another_network_s_parameters_are_refused():
    other = Net(nnx.Rngs(0))
    other.more = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="differ by more.bias, more.kernel"):
        CASES["nnx"].params_of(other)
    wide = functools.partial(changed, CASES["nnx"], make=lambda rngs: Net(rngs))
    narrow = Net(nnx.Rngs(0))
    narrow.head = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"head.bias of the network is \[4\], but \[5\] in one"):
        wide().params_of(narrow)


def test_who_it_is_follows_from_weights_and_places_not_from_where_its_code_is():
    config = CASES["nnx"]
    params = base.init(config, jax.random.key(0))
    named = identity.of(config, params)
    moved = changed(config, make=lambda rngs: Net(rngs))
    assert identity.of(moved, params) == named
    assert identity.of(dataclasses.replace(config, name="another"), params) == named
    assert identity.of(changed(config, pooling="first"), params) != named
    assert identity.of(changed(config, pooling=corner), params) != named


def test_what_is_made_of_no_text_and_no_image_comes_in_batches():
    config = CASES["bridged"]
    model = ee.Model.of(config, base.init(config, jax.random.key(0)))
    rows = {"rows": GIVEN["rows"]}
    assert ee.classify(model, rows).labels.shape == (2,)
    with pytest.raises(ValueError, match="reads rows, .* give batches, with rows and labels"):
        ee.classify(model, [GIVEN["rows"][0]])


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(families, "_known", list(families.every()))
    return ee.register.network(dataclasses.replace(CASES["bridged"], name="bridged"))


def test_it_is_saved_and_loaded_by_its_name(registered, tmp_path):
    model = ee.Model.of(registered, base.init(registered, jax.random.key(0)))
    model = ee.attach(model, ExitConfig((1, 2), "mlp"), init="random")
    again = ee.load(ee.save(model, tmp_path / "model"))
    assert again.static == model.static
    assert tree.fingerprint(again.params) == tree.fingerprint(model.params)
    assert ee.register.network(registered) is registered  # twice is once
    with pytest.raises(ValueError, match="serves bridged, as of bridged does"):
        ee.register.network(dataclasses.replace(CASES["linen"], name="bridged"))


def test_a_network_whose_code_has_changed_since_is_not_loaded(registered, tmp_path, monkeypatch):
    model = ee.Model.of(registered, base.init(registered, jax.random.key(0)))
    folder = ee.save(model, tmp_path / "model", exits_only=False)
    monkeypatch.setattr(
        families, "_known", [f for f in families._known if f.__name__ != "of bridged"]
    )
    shorter = changed(registered, blocks=("parts.0", "parts.1"))
    ee.register.network(shorter)
    with pytest.raises(ValueError, match="saved with depth = 3, not 2; register the network"):
        ee.load(folder)
