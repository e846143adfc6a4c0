import types

import pytest

from early_exit.decoding.sampling import GREEDY, Sampling
from early_exit.evaluation.requests import Asked, grouped, task_of


def request(*arguments, task="t"):
    return types.SimpleNamespace(args=("A prompt", *arguments), task_name=task)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Asked(99, (), GREEDY)),
        ({"until": "x", "max_gen_toks": 5}, Asked(5, ("x",), GREEDY)),
        ({"until": ["x", "y"], "max_tokens": 7, "max_gen_toks": 5}, Asked(5, ("x", "y"), GREEDY)),
        ({"max_new_tokens": None, "max_completion_tokens": 3}, Asked(3, (), GREEDY)),
        ({"until": None, "do_sample": False, "temperature": 0.7}, Asked(99, (), GREEDY)),
        ({"do_sample": True, "temperature": 0.0}, Asked(99, (), GREEDY)),
        ({"temperature": 0.7, "top_p": 0.9}, Asked(99, (), Sampling(0.7, 0, 0.9))),
        ({"do_sample": True, "top_k": 4}, Asked(99, (), Sampling(1.0, 4, 1.0))),
    ],
    ids=str,
)
def test_what_a_request_asks_for(settings, expected):
    assert Asked.of(request(settings), 99) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (({"num_beams": 4, "until": []},), "t asks for num_beams; of the ways to write"),
        (({"repetition_penalty": 1.1},), "t asks for repetition_penalty;"),
        (({}, {"visual": []}), "t shows more than text"),
    ],
)
def test_what_is_not_known_is_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        Asked.of(request(*arguments), 99)


def test_an_answer_is_cut_before_the_first_stop():
    asked = Asked(9, ("END", "", "\n\n"), GREEDY)
    assert asked.cut("one\n\ntwo END") == asked.cut("one END two\n\n").strip() == "one"
    assert asked.stopped("an END") and not asked.stopped("an EN")
    assert Asked(9, (), GREEDY).cut("all of it") == "all of it"


def test_requests_of_a_kind_go_together_in_order():
    assert list(grouped("abcab")) == [("a", [0, 3]), ("b", [1, 4]), ("c", [2])]
    assert task_of(request({})) == "t" and task_of(request({}, task=None)) == "no task"
