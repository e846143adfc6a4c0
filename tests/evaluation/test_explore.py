"""What a page carries of an answer is what decoding and calibration would have found there."""

import base64
import dataclasses
import io
import pathlib
import types

import jax
import numpy as np
import pytest
from PIL import Image
from slow_decoder import SlowDecoder

from early_exit import confidence as confidences
from early_exit import policy as policies
from early_exit.calibration import temperature, thresholds
from early_exit.calibration.records import Records, Softened
from early_exit.data.examples import Examples
from early_exit.decoding.generate import generate
from early_exit.evaluation import exits, explore, scoring, shown
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load
from early_exit.storage import files

CHAT = pathlib.Path(__file__).parents[1] / "fixtures" / "tiny_chat"
NEW = 20


@pytest.fixture(scope="module")
def tuned():
    pretrained = load(str(CHAT))
    model = MultiExit(pretrained.config, ExitConfig(points=(2, 4), head="norm", classes=200))
    ids = jax.numpy.arange(200, dtype="int32")
    heads = model.init_exits(jax.random.key(0), pretrained.params, "copy", ids)
    return types.SimpleNamespace(
        model=model,
        params={"backbone": pretrained.params, "exits": heads, "token_ids": ids},
        tokenizer=pretrained.tokenizer,
        stop_ids=list(pretrained.generation.stop_ids),
        config=types.SimpleNamespace(evaluate=types.SimpleNamespace(sample_tokens=NEW)),
    )


@pytest.fixture(scope="module")
def records(tuned):
    tokens = np.random.default_rng(0).integers(0, tuned.model.config.vocab_size, (4, 32))
    batch = {
        "tokens": tokens.astype(np.int32),
        "documents": np.ones((4, 32), np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)),
    }
    return exits.record(tuned.model, tuned.params, [batch], soften=True)


PROMPT = [5, 90, 17, 44]


@pytest.fixture(scope="module")
def answer(tuned):
    (found,) = generate(
        tuned.model,
        tuned.params,
        [PROMPT],
        policy=None,
        max_new_tokens=NEW,
        stop_ids=tuned.stop_ids,
    )
    return found.tokens.tolist()


def with_infinities(rows):
    return np.array([[-np.inf if x is None else x for x in row] for row in rows])


def test_each_exit_says_what_it_says_of_the_whole_text(tuned, records, answer):
    policy = policies.make([0.02, 0.02])
    found = explore.explorer(tuned, records, policy, [("a prompt", PROMPT)])
    (looked,) = found["answers"]
    assert len(looked["pieces"]) == len(answer) and looked["prompt"] == "a prompt"
    slow = SlowDecoder(tuned.model, tuned.params)
    states = slow.states([*PROMPT, *answer])
    places = range(len(PROMPT) - 1, len(PROMPT) - 1 + len(answer))
    for e in range(2):
        for i, at in enumerate(places):
            score, best = slow.score("max_prob", states, e, at, [])
            kept = looked["scores"][e][i]
            assert (kept is None) == (best is None)
            if kept is not None:
                assert kept == pytest.approx(score, abs=1e-5)
                assert looked["said"][e][i] == best
    assert looked["said"][2] == answer
    text = tuned.tokenizer.decode
    assert all(found["words"][str(token)] == text([token]) for token in answer)
    assert found["depths"] == [2, 4, 6] and found["costs"][-1] == 1


@pytest.mark.parametrize("fields", [{}, {"decay": 3.0}, {"temperatures": [2.0, 0.5, 1.0]}], ids=str)
def test_positions_leave_where_given_text_would(tuned, records, answer, fields):
    policy = policies.make([0.02, 0.02], **fields)
    (looked,) = explore.explorer(tuned, records, policy, [("", PROMPT)])["answers"]
    (expected,) = scoring.score(
        tuned.model,
        tuned.params,
        [(PROMPT, answer)],
        policy=policy,
        mode=None,
        limits=[NEW],
    )
    assert looked["exits"] == expected.exits.tolist()
    assert looked["exits"][0] == 2
    if "decay" not in fields:  # the page finds the same by comparing numbers
        scores = with_infinities(looked["scores"])[:, 1:]
        limits = np.asarray(policy.thresholds)
        assert looked["exits"][1:] == policies.first_exit(scores[:-1], limits).tolist()


def test_numbers_in_the_page_compare_as_float32_does(tuned, records):
    """Thresholds are scores that were seen, so equal numbers must stay equal."""
    found = explore.explorer(tuned, records, policies.make([0.02, 0.02]), [("", PROMPT)])
    seen = {x for row in explore._numbers_of(records.score("max_prob")[:-1]) for x in row}
    limits = {x for row in found["thresholds"] for x in row} - {"never", None}
    assert limits and limits <= seen
    values = np.sort(np.random.default_rng(0).random(2000).astype(np.float32))
    kept = explore._numbers_of(values[None])[0]
    assert np.float32(kept).tolist() == values.tolist() and sorted(kept) == kept


def test_thresholds_are_those_of_each_epsilon(tuned, records):
    found = explore.explorer(tuned, records, policies.make([0.02, 0.02]), [("", PROMPT)])
    words = {"never": np.inf, None: -np.inf}
    for epsilon in (0.5, 0.9, 1.0):
        row = found["thresholds"][found["epsilons"].index(epsilon)]
        policy = thresholds.fit(records, "max_prob", epsilon)
        expected = np.asarray(policy.thresholds)
        assert np.float32([words.get(x, x) for x in row]).tolist() == expected.tolist()


def test_there_is_nothing_to_look_into_without_exits_or_known_temperatures(tuned, records):
    unknown = policies.make([0.5, 0.5], temperatures=[1.1, 1.0, 1.0])
    assert explore.explorer(tuned, records, unknown, [("", PROMPT)]) is None
    bare = dataclasses.replace(tuned.model, exits=dataclasses.replace(tuned.model.exits, points=()))
    without = types.SimpleNamespace(**vars(tuned) | {"model": bare})
    assert explore.explorer(without, records, policies.make([]), [("", PROMPT)]) is None


def row(speedup, shares, mode="lossy"):
    return {"mode": mode, "speedup": speedup, "exit_shares": [*shares, 0.0, 0.0]}


COSTS = [0.2, 0.6, 1.0]


def test_the_line_goes_through_what_was_measured():
    rows = [row(1.0, [0, 0, 1], None), row(5.0, [0, 0, 1], "verified: lookup")]
    # Costs 0.6 and 0.8; time = 0.2 + cost.
    rows += [row(1 / 0.8, [0, 1, 0]), row(1 / 1.0, [0, 0.5, 0.5])]
    line = pytest.approx({"fixed": 0.2, "slope": 1.0, "points": 2})
    assert explore.of_decoding(rows, COSTS) == line
    # Of a classifier: by the time of one example, the full model's own row left out.
    rows = [(1.0, [0, 0, 1]), (0.8, [0, 1, 0]), (1.0, [0, 0.5, 0.5])]
    rows = [{"latency_ratio": time, "exit_shares": shares} for time, shares in rows]
    assert explore.of_classifying(rows, COSTS) == line


@pytest.mark.parametrize(
    ("times", "shares"),
    [
        ([0.8], [[0, 1, 0]]),  # one alone
        ([0.8, 0.8], [[0, 1, 0], [0, 1, 0]]),  # twice the same
        ([0.83, 0.77], [[0, 1, 0], [0, 0.9, 0.1]]),  # dearer and faster: noise
    ],
)
def test_where_no_line_can_be_told_time_is_in_proportion(times, shares):
    found = explore.speed_line(shares, times, COSTS)
    assert found["fixed"] == 0 and found["slope"] > 0
    costs = [float(np.dot(row, COSTS)) for row in shares]
    assert found["slope"] == pytest.approx(np.mean(times) / np.mean(costs))


def test_without_a_policy_timed_speed_is_by_cost_alone():
    assert explore.speed_line([], [], COSTS) == {"fixed": 0.0, "slope": 1.0, "points": 0}


IMAGES = Examples(
    ("cat", "dog"),
    np.arange(40),
    lambda i: {"image": np.full((4, 4, 1), 6 * i, np.uint8), "label": i % 2},
)


@pytest.fixture(scope="module")
def of_images():
    """(calibration records, test records) of 40 images at three exits, as `exits.record` gives."""

    def records(seed, labels):
        rng = np.random.default_rng(seed)
        right = rng.random((3, len(labels))) < [[0.6], [0.8], [0.95]]
        scores = rng.random((3, len(labels)), np.float32)
        return Records(
            exit_depths=np.array([2, 4, 6]),
            costs=np.array([30.0, 70.0, 100.0]),
            scores={"max_prob": scores},
            predictions=np.where(right, labels, 1 - labels),
            labels=labels,
            losses=np.zeros_like(scores),
            groups=np.arange(len(labels)),
            softened=Softened(
                np.array(confidences.TEMPERATURES),
                rng.random((len(confidences.TEMPERATURES), *scores.shape), np.float32),
                rng.random(scores.shape, np.float32),
            ),
        )

    labels = np.array([example["label"] for example in IMAGES])
    return records(0, np.resize(labels, 300)), records(1, labels)


@pytest.mark.parametrize("fields", [{}, {"decay": 3.0}, {"temperatures": [2.0, 0.5, 1.0]}], ids=str)
def test_examples_leave_where_the_policy_says(of_images, fields):
    records, test = of_images
    policy = policies.make([0.7, 0.5], **fields)
    found = explore.examples(records, policy, test, IMAGES, count=30)
    (answer,) = found["answers"]
    if "temperatures" in fields:
        test = temperature.apply(test, np.array(fields["temperatures"]))
    scores = test.score("max_prob")[:, :30]
    expected = [
        next((e for e in range(2) if policy.leaves(e, score[e], 0.0)), 2) for score in scores.T
    ]
    assert answer["exits"] == expected and len(set(expected)) == 3
    # The page finds the same by comparing numbers.
    limits = np.float32(found["policy"])
    assert policies.first_exit(np.float32(answer["scores"])[:-1], limits).tolist() == expected
    assert answer["said"] == test.predictions[:, :30].tolist()
    assert [found["words"][str(label)] for label in answer["labels"]] == ["cat", "dog"] * 15
    assert found["costs"] == [0.3, 0.7, 1.0] and found["pictures"]
    softened = (
        records
        if "temperatures" not in fields
        else temperature.apply(records, np.array(fields["temperatures"]))
    )
    for epsilon in (0.5, 0.995, 1.0):
        fitted = thresholds.fit(softened, "max_prob", epsilon)
        row = found["thresholds"][found["epsilons"].index(epsilon)]
        assert (
            np.float32([np.inf if x == "never" else x for x in row]).tolist()
            == np.asarray(fitted.thresholds).tolist()
        )


def test_as_many_examples_as_there_is_room_for(of_images, monkeypatch):
    records, test = of_images
    given = (records, policies.make([0.7, 0.5]), test, IMAGES)
    whole = explore.examples(*given, count=1000)
    pieces = whole["answers"][0]["pieces"]
    assert len(pieces) == len(IMAGES)
    room = sum(len(piece) + 60 for piece in pieces[:7]) + 59
    monkeypatch.setattr(explore, "EXAMPLES_BYTES", room)
    (answer,) = explore.examples(*given, count=1000)["answers"]
    assert answer["pieces"] == pieces[:7]
    assert all(len(x) == 7 for x in (*answer["said"], *answer["scores"], answer["labels"]))


@pytest.mark.parametrize("length", [1, 400])
def test_however_many_are_asked_for_the_page_stays_below_a_megabyte(of_images, length):
    records, _ = of_images
    test = records.take(np.arange(20_000) % 300)
    texts = Examples(
        ("cat", "dog"),
        np.arange(20_000),
        lambda i: {"text": f"{i} " * length, "label": int(test.labels[i])},
    )
    found = explore.examples(records, policies.make([0.7, 0.5]), test, texts, count=20_000)
    assert 2_000 < len(found["answers"][0]["pieces"]) < 20_000
    assert 400_000 < len(files.json_text(found, separators=(",", ":")).encode()) < 2**20 - 150_000


def test_there_are_no_examples_to_look_into_without_exits_or_known_temperatures(of_images):
    records, test = of_images
    policy = policies.make([0.7, 0.5])
    assert explore.examples(records, policy, test, IMAGES, count=0) is None
    unknown = policies.make([0.7, 0.5], temperatures=[1.1, 1.0, 1.0])
    assert explore.examples(records, unknown, test, IMAGES, count=9) is None


def test_what_is_looked_into_is_small():
    drawing = np.zeros((32, 32, 3), np.uint8)
    drawing[8:20, 4:28] = 255
    photograph = np.random.default_rng(0).normal(128, 30, (300, 200, 3)).clip(0, 255)
    drawn, taken = shown.pieces(
        [{"image": drawing}, {"image": photograph.astype(np.uint8)}], bytes_in_all=10**5
    )
    assert drawn.startswith("data:image/png;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(picture), drawing)
    assert taken.startswith("data:image/jpeg;base64,") and len(taken) < 8_000
    assert Image.open(io.BytesIO(base64.b64decode(taken.partition(",")[2]))).size == (43, 64)
    (text,) = shown.pieces([{"text": "one  two\nthree " * 100}], bytes_in_all=10**5)
    assert text.startswith("one two three one") and text.endswith(" …") and len(text) <= 162
