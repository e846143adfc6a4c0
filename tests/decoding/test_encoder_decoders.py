"""Networks whose encoder reads the prompt: every mode against the slow decoder, rows, sessions."""

import pathlib

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_decoder import CLOSE, SlowDecoder, mixed_policy

from early_exit.decoding.decoder import Decoder
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY, VERIFIED, served, verified
from early_exit.decoding.sampling import Sampling
from early_exit.decoding.session import Request, Session
from early_exit.evaluation import scoring, tradeoff
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures/tiny_t5_gated"
NEW = 24
KEY = jax.random.split(jax.random.key(0), 1)[0]


@pytest.fixture(scope="module")
def said():
    """What torch says, and the prompts without their padding."""
    found = np.load(FOLDER / "expected.npz")
    rows = zip(found["prompt"], found["mask"], strict=True)
    return found, [prompt[real].tolist() for prompt, real in rows]


@pytest.fixture(scope="module")
def model():
    """(model, parameters): exits after both blocks but the last, drawn wide, with gates."""
    found = load(str(FOLDER))
    static = MultiExit(found.config, ExitConfig((1, 2), head="mlp", output="own", gate=True))
    exits = static.init_exits(jax.random.key(1), found.params, "random", None)
    exits = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, exits)
    return static, {"backbone": found.params, "exits": exits}


def beside(prompt):
    """What the slow decoder gives the stem."""
    return {"prompt": jnp.array([prompt]), "prompt_real": jnp.ones((1, len(prompt)), bool)}


def test_greedy_answers_are_transformers(model, said):
    torch, prompts = said
    for got, want in zip(
        generate(*model, prompts, policy=None, max_new_tokens=NEW), torch["answers"], strict=True
    ):
        assert got.tokens.tolist() == want[1:].tolist()


# CALM's three confidences, and its threshold that falls over the answer.
CASES = {
    "softmax, lossy": (LOSSY, "max_prob", {}),
    "softmax falling, lossy": (LOSSY, "max_prob", {"decay": 4.0}),
    "states alike, lossy": (LOSSY, "similarity", {}),
    "gate, lossy": (LOSSY, "gate", {}),
    "margin, deferred": (DEFERRED, "margin", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_exits_equal_the_slow_decoder(model, said, case):
    """Each row by itself, with its own prompt; and all three together."""
    mode, confidence, fields = CASES[case]
    static, params = model
    prompts = said[1]
    start = [static.config.start_id]
    policy = mixed_policy(
        static, params, start, mode, confidence, NEW, beside(prompts[0]), **fields
    )
    got = generate(static, params, prompts, policy=policy, max_new_tokens=NEW, mode=mode)
    depths = set()
    for i, prompt in enumerate(prompts):
        key = jax.random.split(jax.random.key(0), len(prompts))[i]
        slow = SlowDecoder(static, params, **beside(prompt))
        want = slow.decode(start, policy, mode, NEW, key)
        assert got[i].tokens.tolist() == want.tokens
        assert got[i].exits.tolist() == want.exits
        np.testing.assert_allclose(got[i].log_probs, want.log_probs, atol=CLOSE)
        depths |= set(want.exits)
    assert depths == {0, 1, 2}


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.3)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("mode", [VERIFIED, verified("lookup")], ids=lambda mode: mode.name)
def test_what_is_verified_is_the_full_model_s(model, said, mode, sampling):
    static, params = model
    start = [static.config.start_id]
    policy = mixed_policy(static, params, start, DEFERRED, length=NEW, beside=beside(said[1][0]))
    how = {"max_new_tokens": NEW, "sampling": sampling}
    full = generate(static, params, said[1], policy=None, **how)
    got = generate(static, params, said[1], policy=policy, mode=served(mode, static), **how)
    assert [g.tokens.tolist() for g in got] == [f.tokens.tolist() for f in full]
    assert sum(g.counts.drafted_BW.sum() for g in got) > 0


def test_a_busy_session_answers_each_as_if_alone(model, said):
    """More prompts than rows, of several lengths; some join late, one is cancelled."""
    static, params = model
    start = [static.config.start_id]
    policy = mixed_policy(static, params, start, LOSSY, length=NEW, beside=beside(said[1][0]))
    decoder = Decoder(static, params, policy, (), LOSSY)
    # Prefixes are asked for in vain: what an encoder reads hangs on all of the prompt.
    session = Session(decoder, rows=2, prefix_bytes=1 << 20)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 61, n).tolist() for n in (3, 40, 17, 40, 1)]
    prompts[3][:-1] = prompts[1][:-1]
    asked = [Request(prompt, int(n)) for prompt, n in zip(prompts, (9, 4, 12, 7, 5), strict=True)]
    ids = [session.add(request) for request in asked[:3]]
    answers, later = {}, asked[3:]
    while session.busy:
        for event in session.step(2):
            if event.ended:
                answers[event.id] = event
        if later and answers:
            ids += [session.add(request) for request in later]
            session.cancel(ids[-1])
            later = []
    assert answers[ids[-1]].ended == "cancelled"
    for request, name in zip(asked[:-1], ids[:-1], strict=True):
        (alone,) = generate(
            static, params, [request.prompt], policy=policy, max_new_tokens=request.max_new_tokens
        )
        np.testing.assert_array_equal(answers[name].answer.tokens, alone.tokens)
        np.testing.assert_array_equal(answers[name].answer.exits, alone.exits)


@pytest.mark.parametrize("mode", [LOSSY, DEFERRED], ids=lambda mode: mode.name)
def test_given_answers_are_scored_as_they_would_be_decoded(model, said, mode):
    static, params = model
    start, prompts = [static.config.start_id], said[1]
    policy = mixed_policy(static, params, start, mode, length=NEW, beside=beside(prompts[0]))
    how = {"policy": policy, "mode": mode}
    decoded = generate(static, params, prompts, max_new_tokens=NEW, **how)
    pairs = [(prompt, g.tokens.tolist()) for prompt, g in zip(prompts, decoded, strict=True)]
    for got, want in zip(scoring.score(static, params, pairs, **how), decoded, strict=True):
        assert got.chosen.all()
        np.testing.assert_array_equal(got.exits, want.exits)
        np.testing.assert_allclose(got.log_probs, want.log_probs, atol=CLOSE)
    full = generate(static, params, prompts, policy=None, max_new_tokens=NEW)
    for prompt, answer in zip(prompts, full, strict=True):
        assert tradeoff.agreement(static, params, prompt, answer).all()


ON_MESH = """
import json, sys
import jax, numpy as np
from early_exit import policy as policies, sharding
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load
from early_exit.settings.sections import MeshSettings

network = load(sys.argv[1])
model = MultiExit(network.config, ExitConfig((1, 2), head="mlp", output="own"))
exits = model.init_exits(jax.random.key(1), network.params, "random", None)
params = {"backbone": network.params, "exits": exits}
policy = policies.make([0.021, 0.021], "max_prob")
prompts = [[7, 3, 52, 11, 29], [5] * 30, [9], [9, 8, 9, 8]]
found = []
for axes in (None, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = axes and sharding.make_mesh(MeshSettings(**axes))
    placed = sharding.place(params, sharding.shardings(params, mesh)) if mesh else params
    for mode in (LOSSY, DEFERRED):
        how = {"mode": mode, "max_new_tokens": [9, 7, 12, 8], "policy": policy}
        answers = generate(model, placed, prompts, **how)
        found.append([[a.tokens.tolist(), a.exits.tolist(), a.log_probs.tolist()] for a in answers])
print(json.dumps(found))
"""


@pytest.mark.long
def test_a_mesh_says_what_one_device_says():
    """Five heads, which no axis divides; prompts of other lengths in each row."""
    lossy, deferred, *on_mesh = fake_devices.found(ON_MESH, FOLDER)
    for one, many in zip((lossy, deferred), on_mesh, strict=True):
        assert len({e for _, exits, _ in one for e in exits}) > 1
        for (tokens, exits, log_probs), (others, theirs, close) in zip(one, many, strict=True):
            assert (tokens, exits) == (others, theirs)
            np.testing.assert_allclose(log_probs, close, atol=1e-5, rtol=1e-5)


def test_a_prompt_and_its_answer_have_a_context_each(model):
    static, params = model
    how = {"policy": None, "max_new_tokens": 63}
    (answer,) = generate(static, params, [[5] * 64], **how)
    assert len(answer.tokens) == 63
    with pytest.raises(ValueError, match="prompt 0 has 65 tokens but the model reads 64"):
        generate(static, params, [[5] * 65], **how)
    with pytest.raises(ValueError, match="need 65 positions but the model's context is 64"):
        generate(static, params, [[5]], policy=None, max_new_tokens=64)


def test_a_recurrent_exit_is_refused(model):
    with pytest.raises(ValueError, match="not at the prompt that an encoder has read"):
        MultiExit(model[0].config, ExitConfig((1,), recurrent_taps=(2,)))
