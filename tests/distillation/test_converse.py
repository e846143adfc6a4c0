"""Conversations of a speaker whose words are given: tried is what becomes of them."""

import json
import pathlib

import numpy as np
import pytest

from early_exit.backbones.resnet import ResNetConfig
from early_exit.data import conversations, shards, sources
from early_exit.data.conversations import Conversation, Fault, Rules, Words
from early_exit.data.stream import Rank
from early_exit.distillation.converse import Settings, Speaker, converse
from early_exit.pretrained.generation import Generation
from early_exit.pretrained.load import Pretrained
from early_exit.pretrained.tokenizer import load_tokenizer

TINY_CHAT = pathlib.Path(__file__).parents[1] / "fixtures/tiny_chat"
ENDS = (0, 2)  # <|endoftext|> and <|im_end|>
NOUNS = ["name", "class", "import", "self", "number", "letter", "word", "order", "noise", "zero"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_CHAT)


def network(config, params, tokenizer):
    return Pretrained(config, params, tokenizer, "nowhere", Generation(ENDS))


class Scripted(Speaker):
    """Asks and answers by the seed it is given; what it was asked to write stands in `calls`."""

    def __init__(self, tiny, tokenizer, share_ended=0.9):
        model, params = tiny
        super().__init__(network(model.config, params["backbone"], tokenizer))
        self.share_ended, self.calls = share_ended, []

    def write(self, prompts, sampling, max_new_tokens, stop_ids, seed, batch):
        self.calls.append((prompts, sampling, max_new_tokens, stop_ids, seed))
        rng = np.random.default_rng(seed)
        written = []
        for _ in prompts:
            text = " ".join(rng.choice(NOUNS, 6))
            tokens = self.tokenizer.encode(text)
            written.append(Words(text, tokens, bool(rng.random() < self.share_ended)))
        return written


SETTINGS = Settings(per_shard=8, rules=Rules(unfinished=False, repeated=1.0))


@pytest.fixture
def speaker(tiny, tokenizer):
    return Scripted(tiny, tokenizer)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made_conversations(folder):
    return [Conversation.unpack(record) for record in shards.Store(folder)]


def test_an_interrupted_run_makes_the_same_bytes(speaker, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    list(converse(speaker, whole, SETTINGS, tokens=3000))
    assert len(shards.finished(whole)) > 2
    next(converse(speaker, cut, SETTINGS, tokens=3000))
    assert shards.finished(cut).keys() == {0}
    list(converse(speaker, cut, SETTINGS, tokens=3000))
    assert contents(cut) == contents(whole)
    calls = len(speaker.calls)
    assert not list(converse(speaker, whole, SETTINGS, tokens=3000))
    assert len(speaker.calls) == calls


def test_no_two_shards_draw_the_same(speaker, tmp_path):
    list(converse(speaker, tmp_path, SETTINGS, tokens=4000))
    seeds = [call[-1] for call in speaker.calls]
    assert len(set(seeds)) == len(seeds) > 4
    questions = [conversation.prompt for conversation in made_conversations(tmp_path)]
    assert len(set(questions)) == len(questions)


def test_it_stops_with_the_shard_that_completes_the_tokens(speaker, tmp_path):
    made = list(converse(speaker, tmp_path, SETTINGS, tokens=2500))
    sums = np.cumsum([shard["tokens"] for shard in made])
    assert sums[-1] >= 2500 > sums[-2]
    counted = sum(conversation.tokens for conversation in made_conversations(tmp_path))
    assert counted == sums[-1]


def test_processes_share_the_numbers(tiny, tokenizer, tmp_path):
    questions = [f"question {number}" for number in range(20)]
    folders = tmp_path / "alone", tmp_path / "shared"
    list(converse(Scripted(tiny, tokenizer), folders[0], SETTINGS, prompts=questions))
    for index in (1, 0):
        speaker = Scripted(tiny, tokenizer)
        rank = Rank(index, 2)
        made = list(converse(speaker, folders[1], SETTINGS, prompts=questions, rank=rank))
        assert len(made) == len(speaker.calls) == (2, 1)[index]
    assert contents(folders[0]) == contents(folders[1])


def test_a_text_gives_pipelines_what_was_read_and_written(tiny, tokenizer, tmp_path):
    speaker = Scripted(tiny, tokenizer, share_ended=1)
    list(converse(speaker, tmp_path, SETTINGS, tokens=1))
    asked, answered = speaker.calls
    assert asked[1] == SETTINGS.question and answered[1] == SETTINGS.answer
    end = tokenizer.eos_token_id
    assert end in asked[3] and end in answered[3]
    made = made_conversations(tmp_path)
    openings = {c.text: opening for c, opening in zip(made, answered[0], strict=True)}
    by_text = {conversation.text: conversation for conversation in made}
    train = sources.documents(f"made:{tmp_path}", "train")
    assert len(train) > 3
    for name, text in train:
        tokens = [*tokenizer.encode(text), end]
        opening, conversation = openings[text], by_text[text]
        assert tokens[: len(opening)] == opening and opening[: len(asked[0][0])] == asked[0][0]
        assert tokenizer.decode(tokens[len(opening) : -1]) == conversation.answer
        assert len(tokens) == conversation.tokens and name.startswith(f"{tmp_path.name}:")


def test_an_answer_that_ends_otherwise_than_a_text_keeps_its_end(tiny, tokenizer, tmp_path):
    """Pipelines end a document with the end of a text; a turn may have an end of its own."""
    end_of_text, end_of_turn = ENDS
    assert tokenizer.eos_token_id == end_of_turn
    for number, (end, kept) in enumerate(((end_of_text, "<|endoftext|>"), (end_of_turn, ""))):

        class Ending(Scripted):
            def write(self, *given, end=end):
                written = super().write(*given)
                return [self._words([*words.tokens, end], ENDS) for words in written]

        list(converse(Ending(tiny, tokenizer), tmp_path / str(number), SETTINGS, tokens=1))
        made = made_conversations(tmp_path / str(number))
        assert made and all(c.text.endswith(c.answer + kept) for c in made)
        assert all(len(tokenizer.encode(c.text)) + 1 == c.tokens for c in made)


def test_what_is_dropped_is_counted(tiny, tokenizer, tmp_path):
    speaker = Scripted(tiny, tokenizer, share_ended=0.7)
    list(converse(speaker, tmp_path, SETTINGS, tokens=3000))
    for shard in shards.finished(tmp_path).values():
        assert shard["records"] + sum(shard["dropped"].values()) == SETTINGS.per_shard
    rows, _ = conversations.summary(tmp_path)
    counts = {name: count for name, count, _ in rows}
    assert counts.keys() == {"kept", Fault.ENDLESS_QUESTION, Fault.ENDLESS_ANSWER}
    assert sum(share for *_, share in rows) == pytest.approx(1)


def test_questions_of_a_file(tiny, tokenizer, tmp_path):
    prompts = ["the class", "  the name", "<|im_end|>", "The  Class", "in " * 9, "a b" * 200, "on"]
    speaker = Scripted(tiny, tokenizer, share_ended=1)
    settings = Settings(per_shard=7, max_new_tokens=100, rules=Rules(repeated=0.5))
    (shard,) = converse(speaker, tmp_path, settings, prompts=prompts)
    assert [c.prompt for c in made_conversations(tmp_path)] == ["the class", "the name", "on"]
    assert shard["dropped"] == {
        Fault.SPECIAL_QUESTION: 1,
        Fault.ASKED_BEFORE: 1,
        Fault.LOOPING_QUESTION: 2,
    }
    settings = Settings(per_shard=7, max_new_tokens=100, rules=Rules(repeated=1.0))
    (shard,) = converse(speaker, tmp_path / "long", settings, prompts=prompts)
    assert shard["dropped"][Fault.LONG_QUESTION] == 1


def test_raw_prompts_are_continued(tiny, tokenizer, tmp_path):
    speaker = Scripted(tiny, tokenizer, share_ended=1)
    settings = Settings(per_shard=4, raw=True, rules=Rules(repeated=1.0))
    list(converse(speaker, tmp_path, settings, prompts=["def f(self):"]))
    (conversation,) = made_conversations(tmp_path)
    assert conversation.text == conversation.prompt + conversation.answer
    assert conversation.prompt == "def f(self):"


def test_an_answer_whose_text_encodes_otherwise_is_dropped(tiny, tokenizer, tmp_path):
    class Spelling(Scripted):
        def write(self, prompts, *given):
            spelt = [token for letter in "the class" for token in self.tokenizer.encode(letter)]
            return [Words("the class", spelt, True) for _ in prompts]

    settings = Settings(rules=Rules(repeated=1.0))
    (shard,) = converse(Spelling(tiny, tokenizer), tmp_path, settings, prompts=["a", "b"])
    assert shard["dropped"] == {Fault.OTHER_TOKENS: 2}


def test_a_model_that_never_ends_a_question_is_an_error(tiny, tokenizer, tmp_path):
    speaker = Scripted(tiny, tokenizer, share_ended=0)
    with pytest.raises(ValueError, match=r"not one .* kept: question without an end \(8\)"):
        list(converse(speaker, tmp_path, SETTINGS, tokens=1))


def test_a_folder_of_another_model_or_other_settings_is_refused(speaker, tiny, tokenizer, tmp_path):
    list(converse(speaker, tmp_path, SETTINGS, tokens=1))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds records with another prompts, seed; name another"):
        list(
            converse(
                speaker,
                tmp_path,
                Settings(per_shard=8, rules=SETTINGS.rules, seed=1),
                prompts=["a"],
            )
        )
    model, params = tiny
    other = params | {"backbone": params["backbone"] | {"final_norm": {"scale": np.ones(24) * 2}}}
    with pytest.raises(ValueError, match="holds records with another backbone; name another"):
        list(converse(Scripted((model, other), tokenizer), tmp_path, SETTINGS, tokens=1))
    assert contents(tmp_path) == before


def test_a_folder_that_knows_its_model_by_the_weights_alone_goes_on(speaker, tmp_path):
    """As all did before fingerprints were of the config, too."""
    list(converse(speaker, tmp_path, SETTINGS, tokens=1))
    about = json.loads((tmp_path / "about.json").read_text())
    old = about | {"backbone": speaker.network.identity.weights}
    (tmp_path / "about.json").write_text(json.dumps(old))
    list(converse(speaker, tmp_path, SETTINGS, tokens=1000))
    assert json.loads((tmp_path / "about.json").read_text()) == old
    assert len(shards.finished(tmp_path)) > 1


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (Settings(), {}, "say how many tokens to make, or give prompts to answer"),
        (Settings(raw=True), {"tokens": 9}, "without a chat template there is no user"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(speaker, tmp_path, settings, given, message):
    with pytest.raises(ValueError, match=message):
        list(converse(speaker, tmp_path, settings, **given))
    assert not list(tmp_path.iterdir()) and not speaker.calls


def test_a_speaker_needs_words(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="has no tokenizer, .* put its tokenizer.json beside"):
        Speaker(network(model.config, params["backbone"], None))
    with pytest.raises(ValueError, match="writes no text"):
        Speaker(network(ResNetConfig.cifar(8, num_classes=2), {}, None))


@pytest.mark.parametrize("name", ["max_question_tokens", "max_new_tokens", "per_shard"])
def test_settings_that_make_no_sense(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        Settings(**{name: 0})
