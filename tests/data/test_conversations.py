import pathlib
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from early_exit.data import conversations, shards
from early_exit.data.conversations import Conversation, Fault, Rules, Words
from early_exit.pretrained.tokenizer import load_tokenizer

TINY_CHAT = pathlib.Path(__file__).parents[1] / "fixtures/tiny_chat"
SPECIAL = {0, 1, 2}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_CHAT)


@given(st.lists(st.integers(0, 9), max_size=40))
def test_repetition_of_what_is_said_once_twice_and_for_ever(tokens):
    once = list(range(100, 100 + len(tokens)))
    assert conversations.repetition(once) == 0
    assert 0 <= conversations.repetition(tokens) < 1
    if len(tokens) >= 4:
        # A second time, all 4-grams occur again, but for three across the border that are new.
        again = conversations.repetition(once + once)
        assert again == pytest.approx((len(once) - 3) / (2 * len(once) - 3))
        assert conversations.repetition(tokens * 30) > 0.9


def words(tokens, ended=True, text="some words"):
    return Words(text, tokens, ended)


RISING = list(range(3, 40))


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        (words(RISING), None),
        (words([5]), None),
        (words(RISING, ended=False), Fault.ENDLESS_QUESTION),
        (words([], text=""), Fault.EMPTY_QUESTION),
        (words([4, 5], text=" \n"), Fault.EMPTY_QUESTION),
        (words([7, 1, 8]), Fault.SPECIAL_QUESTION),
        (words([7, 8, 9] * 9), Fault.LOOPING_QUESTION),
    ],
)
def test_faults_of_questions(question, fault):
    assert Rules().fault_of_question(question, SPECIAL) == fault


@pytest.mark.parametrize(
    ("rules", "answer", "fault"),
    [
        (Rules(), words(RISING), None),
        (Rules(), words(RISING, ended=False), None),
        (Rules(unfinished=False), words(RISING, ended=False), Fault.ENDLESS_ANSWER),
        (Rules(unfinished=False), words(RISING), None),
        (Rules(shortest=4), words(RISING[:3]), Fault.SHORT_ANSWER),
        (Rules(shortest=4), words(RISING[:4]), None),
        (Rules(), words([*RISING, 2, 50]), Fault.SPECIAL_ANSWER),
        (Rules(), words(RISING + RISING), Fault.LOOPING_ANSWER),
        (Rules(repeated=0.5), words(RISING + RISING), None),
        (Rules(repeated=0), words([*RISING, *RISING[:4]]), Fault.LOOPING_ANSWER),
        (Rules(repeated=1), words([9] * 99), None),
    ],
)
def test_faults_of_answers(rules, answer, fault):
    assert rules.fault_of_answer(answer, SPECIAL) == fault


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shortest": 0}, "an answer has at least 1 token, not 0"),
        ({"repeated": 1.1}, "share of repeated 4-grams is 0 to 1, not 1.1"),
    ],
)
def test_rules_that_make_no_sense(setting, message):
    with pytest.raises(ValueError, match=message):
        Rules(**setting)


def test_a_text_gives_its_tokens_again_or_there_is_none(tokenizer):
    for text in ("", "name the class", "<|im_start|>user\nhé<|im_end|>\n"):
        assert conversations.text_of(tokenizer, tokenizer.encode(text)) == text
    split = [token for letter in "the" for token in tokenizer.encode(f" {letter}"[-1:])]
    assert (
        conversations.text_of(tokenizer, tokenizer.encode(" ") + split) is None
    )  # " the" is one token
    assert conversations.text_of(tokenizer, tokenizer.encode("é")[:1]) is None  # half a character


def test_what_the_tokenizer_adds_by_itself_is_not_in_the_text():
    adding = load_tokenizer(TINY_CHAT)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokens = adding.encode("in the class")
    assert tokens[0] == 0
    assert conversations.text_of(adding, tokens) == "in the class"
    assert conversations.text_of(adding, tokens[1:]) is None  # it would begin with one token more


def made(folder, *questions, dropped=()):
    """A folder with a shard for each list of questions."""
    shards.begin(folder, {"kind": conversations.KIND})
    for number, asked in enumerate(questions):
        kept = [Conversation(f"{q} Yes, {number}.", q, f"Yes, {number}.", len(q)) for q in asked]
        counted = {"tokens": sum(len(q) for q in asked), "dropped": dict(dropped)}
        shards.write(folder, number, [c.pack() for c in kept], counted)
    return folder


@given(st.text(string.printable + "é\u2028\U0001f600"))
def test_conversations_are_stored_as_they_are(text):
    conversation = Conversation(text, text[::-1], text, 3)
    assert Conversation.unpack(conversation.pack()) == conversation


def test_a_question_of_an_earlier_shard_is_left_out(tmp_path):
    folder = made(tmp_path, ["Why?", "How?"], ["who?", "how? ", "What?"], ["WHO?"])
    found = [(index, c.text) for index, c in conversations.conversations(shards.Store(folder))]
    assert found == [
        (0, "Why? Yes, 0."),
        (1, "How? Yes, 0."),
        (2, "who? Yes, 1."),
        (4, "What? Yes, 1."),
    ]


def test_the_summary_accounts_for_every_question(tmp_path):
    dropped = {Fault.SHORT_ANSWER: 2, Fault.ENDLESS_QUESTION: 1}
    folder = made(tmp_path, ["one", "five"], ["five", "seven"], dropped=dropped)
    rows, tokens = conversations.summary(folder)
    assert rows == [
        ("kept", 3, 0.3),
        ("question without an end", 2, 0.2),
        ("question asked before", 1, 0.1),
        ("answer too short", 4, 0.4),
    ]
    assert tokens == len("one" + "five" + "seven")


def test_nothing_kept_and_something_else_are_errors(tmp_path):
    folder = made(tmp_path / "none", [], dropped={Fault.SHORT_ANSWER: 2})
    with pytest.raises(ValueError, match=r"not one conversation was kept: answer too short \(2\)"):
        conversations.summary(folder)
    shards.begin(tmp_path / "other", {"kind": "hidden states"})
    shards.write(tmp_path / "other", 0, [b"x"], {})
    with pytest.raises(ValueError, match="holds 'hidden states', not 'conversations'"):
        list(conversations.conversations(shards.Store(tmp_path / "other")))
