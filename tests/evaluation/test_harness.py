"""What lm-evaluation-harness is told of a run, beside its own `hf` model on the same weights."""

import dataclasses
import json
import pathlib
import runpy
import types

import jax
import numpy as np
import pytest

from early_exit import policy as policies
from early_exit.decoding.generate import generate
from early_exit.decoding.mode import DEFERRED, LOSSY, verified
from early_exit.exits.heads import ExitConfig
from early_exit.exits.multi_exit import MultiExit
from early_exit.pretrained.load import load
from early_exit.runs.assemble import Tuned

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from early_exit.evaluation import harness, scoring, tasks

pytestmark = pytest.mark.lm_eval

CHAT = pathlib.Path(__file__).parents[1] / "fixtures" / "tiny_chat"
CONTEXTS = ["The sky is blue", "def f(x):\n    return ", "", "One two three ", "A", "x = 1; y"]
CONTINUATIONS = [" because of light", "x + 1\n", "Alone", "four", "\n\n", " = 2"]


@pytest.fixture(scope="module")
def tuned():
    """Exits with random heads on the tiny chat model, that was not tuned."""
    pretrained = load(str(CHAT))
    model = MultiExit(pretrained.config, ExitConfig(points=(2, 4), head="norm", output="shared"))
    heads = model.init_exits(jax.random.key(0), pretrained.params, "copy", None)
    return Tuned(
        model=model,
        params={"backbone": pretrained.params, "exits": heads},
        tokenizer=pretrained.tokenizer,
        generation=pretrained.generation,
        config=types.SimpleNamespace(model=types.SimpleNamespace(source="tiny/chat")),
        workdir=pathlib.Path("runs/tiny"),
        data=None,
        identity=pretrained.identity,
        metadata={},
    )


def asked(kind, *arguments, task="a task"):
    return [Instance(kind, {}, args, 0, (task, i, 1)) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(CHAT), device="cpu", batch_size=4, dtype="float32")


def full(tuned, **how):
    return harness.RunLM(tuned, **{"policy": None, "mode": LOSSY, "batch_size": 4} | how)


@pytest.mark.parity
@pytest.mark.parametrize("mode", [LOSSY, verified("exits")], ids=lambda mode: mode.name)
def test_loglikelihoods_are_those_of_hf(tuned, hf, mode):
    requests = asked("loglikelihood", *zip(CONTEXTS, CONTINUATIONS, strict=True))
    policy = policies.forced(2, 0) if mode.verified else None
    found = full(tuned, mode=mode, policy=policy).loglikelihood(requests)
    for (ours, greedy), (theirs, is_greedy) in zip(found, hf.loglikelihood(requests), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3) and greedy == is_greedy


@pytest.mark.parity
def test_rolling_loglikelihoods_are_those_of_hf(tuned, hf):
    long = " ".join(f"word {i}" for i in range(400))
    requests = asked("loglikelihood_rolling", ("Some text.",), (long,), ("A",))
    found = full(tuned).loglikelihood_rolling(requests)
    assert len(tuned.encode(long)) > tuned.model.config.context_length
    np.testing.assert_allclose(found, hf.loglikelihood_rolling(requests), atol=1e-3, rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("mode", [LOSSY, verified("lookup")], ids=lambda mode: mode.name)
def test_answers_are_those_of_hf(tuned, hf, mode):
    how = {"until": ["zz", "e"], "max_gen_toks": 24, "do_sample": False}
    texts = [text for text in CONTEXTS if text]
    requests = asked("generate_until", *((text, how) for text in texts))
    found = full(tuned, mode=mode).generate_until(requests)
    assert found == hf.generate_until(requests)
    assert not any("e" in text for text in found)


def test_under_a_policy_texts_are_judged_as_decoding_would(tuned):
    policy = policies.make([0.02, 0.02])
    model = harness.RunLM(tuned, policy=policy, mode=DEFERRED, batch_size=2)
    texts = [(CONTEXTS[i], CONTINUATIONS[i]) for i in (0, 4, 5)]  # no context ends with a space
    found = model.loglikelihood(asked("loglikelihood", *texts))
    for (log_prob, greedy), (context, continuation) in zip(found, texts, strict=True):
        pair = tuned.encode(context), tuned.encode(context + continuation)
        scored = pair[1][len(pair[0]) :]
        (alone,) = scoring.score(
            tuned.model, tuned.params, [(pair[0], scored)], policy=policy, mode=DEFERRED
        )
        assert log_prob == pytest.approx(float(alone.log_probs.sum()), abs=1e-4)
        assert greedy == alone.chosen.all()


def test_an_exit_is_asked_by_its_block(tuned):
    how = harness.how_of(tuned, policy="own", exit_after=4, mode=LOSSY)
    model = harness.RunLM(tuned, **how)
    model.loglikelihood(asked("loglikelihood", ("The sky", " is")))
    (row,) = model.rows()
    assert row["exits"] == {"block 4": 1.0} and row["blocks_per_token"] == 4
    assert model.told_policy == "exit after block 4"
    with pytest.raises(ValueError, match="no exit after block 3; it has some after 2, 4"):
        harness.how_of(tuned, policy="own", exit_after=3, mode=LOSSY)


def test_each_task_is_told_what_it_took(tuned):
    model = harness.RunLM(tuned, policy=policies.forced(2, 0), mode=LOSSY, batch_size=3)
    how = {"until": [], "max_gen_toks": 9}
    requests = asked("generate_until", *((text, how) for text in CONTEXTS[:4]), task="writing")
    requests += asked("generate_until", ("A", how | {"max_gen_toks": 5}), task="other")
    texts = model.generate_until(requests)
    rows = {row["task"]: row for row in model.rows()}
    answers = generate(
        tuned.model,
        tuned.params,
        [tuned.encode(text) or [model.prefix_id] for text in CONTEXTS[:4]],
        policy=policies.forced(2, 0),
        max_new_tokens=9,
        stop_ids=tuned.stop_ids,
    )
    decode = tuned.tokenizer.decode
    assert texts[:4] == [decode(x.tokens, skip_special_tokens=True) for x in answers]
    tokens = sum(len(answer.tokens) for answer in answers)
    writing = rows["writing"]
    assert writing["tokens"] == tokens and rows["other"]["tokens"] <= 5
    # The first token of an answer runs every block, all others two.
    assert writing["exits"] == pytest.approx({"block 2": 1 - 4 / tokens, "block 6": 4 / tokens})
    blocks = sum(x.layer_tokens for x in answers) + 4 * 6
    assert writing["blocks_per_token"] == pytest.approx(blocks / tokens)
    assert writing["seconds"] > 0


def test_draws_differ_from_batch_to_batch(tuned):
    model = full(tuned, batch_size=2)
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "top_k": 40}
    requests = asked("generate_until", *((CONTEXTS[0], how) for _ in range(6)))
    assert len(set(model.generate_until(requests))) > 3


def test_an_answer_ends_at_the_first_of_its_stop_strings(tuned):
    model = full(tuned)
    (whole,) = model.generate_until(asked("generate_until", ("A", {"max_gen_toks": 40})))
    late, early = whole[20:22], whole[5:8]
    how = {"until": [late, early], "max_gen_toks": 40}
    (cut,) = model.generate_until(asked("generate_until", ("A", how)))
    assert cut == whole[: min(whole.index(late), whole.index(early))]
    taken = model.rows()[0]["tokens"]
    model.usage.clear()
    model.generate_until(asked("generate_until", ("A", how)))
    assert model.rows()[0]["tokens"] < taken / 2  # it was not written to its end


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("A", {"num_beams": 4}), "asks for num_beams; of the ways to write an answer, until"),
        (("A", {}, {"visual": []}), "shows more than text"),
        (("A", {"max_gen_toks": 10_000}), "leave no room for a prompt in a context of"),
    ],
)
def test_what_cannot_be_answered_is_refused(tuned, arguments, said):
    with pytest.raises(ValueError, match=said):
        full(tuned).generate_until(asked("generate_until", arguments))


def test_a_classifier_is_refused(tuned):
    config = types.SimpleNamespace(classifies=True)
    classifier = dataclasses.replace(tuned, model=types.SimpleNamespace(config=config))
    with pytest.raises(ValueError, match="holds a classifier"):
        harness.RunLM(classifier, policy=None, mode=LOSSY)


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["x", "y"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def folder(tmp_path):
    """Three tasks in files."""
    docs = [{"question": f"Number {i}?", "answer": i % 2} for i in range(5)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "test_split": "train"}
        data["dataset_kwargs"] = {"data_files": str(tmp_path / "docs.jsonl")}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name} | data | task))
    return tmp_path


def test_tasks_in_files_are_run_and_told(tuned, folder, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    model = full(tuned)
    found = tasks.evaluate(model, list(TASKS), include=folder, limit=4)
    scores = {(row["task"], row["metric"]): row for row in found["scores"]}
    assert scores.keys() == {("choices", "acc"), ("whole", "bits_per_byte")} | {
        ("writing", "exact_match")
    }
    assert 0 <= scores["choices", "acc"]["value"] <= 1
    taken = {row["task"]: row for row in found["usage"]}
    assert taken.keys() == TASKS.keys()
    assert all(row["blocks_per_token"] == 6 for row in taken.values())
    assert taken["writing"]["tokens"] <= 4 * 6
    printed = "\n".join(tasks.tables(found))
    assert max(map(len, printed.splitlines())) <= 100 and "whole: tokens from block 6" in printed


def test_unknown_tasks_are_refused_before_any_work(tuned, folder):
    with pytest.raises(ValueError, match="lm-eval knows no task chices, nor in "):
        tasks.evaluate(full(tuned), ["choices", "chices"], include=folder)


TASK_FILES = pathlib.Path(__file__).parents[2] / "experiments" / "tasks"


def test_the_tasks_that_need_no_hub(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    names = ["human_eval_solutions", "standard_library", "gsm_symbolic", "human_eval"]
    names = [f"local_{name}" for name in names]
    model = full(tuned, policy=policies.make([0.02, 0.02]), mode=DEFERRED)
    found = tasks.evaluate(model, names, include=TASK_FILES, limit=2, unsafe=True)
    assert {(row["task"], row["metric"]) for row in found["scores"]} == {
        ("local_human_eval_solutions", "solution_bits"),
        ("local_standard_library", "bits_per_byte"),
        ("local_gsm_symbolic", "exact_number"),
        ("local_human_eval", "pass_at_1"),
    }
    assert all(row["tokens"] and row["blocks_per_token"] < 6 for row in found["usage"])


def test_solutions_are_judged_by_running_them():
    documents = runpy.run_path(str(TASK_FILES / "documents.py"))
    problem = next(iter(documents["human_eval"]()["test"]))
    right, wrong = problem["canonical_solution"], "    return None\n"
    assert documents["passes"](problem, [right]) == {"pass_at_1": 1.0}
    assert documents["passes"](problem, [wrong]) == {"pass_at_1": 0.0}
    ten_bits = -10 * np.log(2) * len(right)
    assert documents["solution_bits"](problem, [(ten_bits, False)])["solution_bits"] == 10
    assert documents["same_number"]({"answer": "1,250"}, ["so 3 and 1,250."])["exact_number"] == 1
    assert documents["same_number"]({"answer": "5"}, ["none"])["exact_number"] == 0
