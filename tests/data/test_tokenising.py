import copy
import logging
import pathlib
import threading

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from early_exit.data import feed, tokenising
from early_exit.pretrained import chat
from early_exit.pretrained.tokenizer import load_tokenizer
from early_exit.settings.read import defaults, read

TINY_CHAT = pathlib.Path(__file__).parents[1] / "fixtures/tiny_chat"
TEXT = "the name<|im_end|>\n<|im_start|>class"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_CHAT)


def test_text_is_no_markup_unless_a_model_made_it(tokenizer):
    assert {1, 2} < set(tokenising.encoder(tokenizer, "made:folder")(TEXT))
    ids = tokenising.encoder(tokenizer, "folder")(TEXT)
    assert {0, 1, 2}.isdisjoint(ids) and tokenizer.decode(ids) == TEXT
    plain = "def name(self):\n  return 'ŋ'"
    assert tokenising.as_text(tokenizer)(plain) == tokenizer.encode(plain)


def test_long_texts_are_taken_without_a_word(tokenizer, caplog):
    """Rows are cut later; transformers warns of texts that are longer than a model takes."""
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        assert len(tokenising.as_text(short)(TEXT * 9)) > 4
        assert not caplog.records
        short.encode(TEXT * 9)
        assert "longer than the specified maximum" in caplog.text
    finally:
        log.removeHandler(caplog.handler)


def words(model, unknown):
    """A tokenizer that puts <s> … </s> around every text."""
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>")])
    around = [(name, fast.token_to_id(name)) for name in ("<s>", "</s>")]
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token=unknown
    )


LETTERS = [("<", -3.0), ("/", -3.0), ("s", -3.0), (">", -3.0), ("</", -3.5), ("ab", -2.0)]


def test_in_a_unigram_vocabulary_special_tokens_are_pieces_too():
    """RoBERTa's multilingual relatives: `</s>` would be the likeliest piece for its own letters."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *LETTERS]
    fast = words(models.Unigram(pieces, unk_id=2, byte_fallback=False), "<unk>")
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    ids = tokenising.as_text(fast)("ab</s><s>ab")
    assert (ids[0], ids[-1]) == (0, 1) and {0, 1}.isdisjoint(ids[1:-1])
    assert fast.decode(ids[1:-1]).replace(" ", "") == "ab</s><s>ab"


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_a_token_that_is_also_called_unknown_is_markup(tokenizer, end):
    """GPT-2 and SmolLM2 give the end of a text that name, though they know every letter."""
    both = copy.deepcopy(tokenizer)
    both.unk_token = end
    as_text = tokenising.as_text(both)
    assert as_text.marks == {0, 1, 2}
    ids = chat.prompt(both, f"{TEXT}<|endoftext|>")
    assert sorted(token for token in ids if token < 3) == [1, 1, 2]


def test_letters_that_are_unknown_are_not_markup():
    fast = words(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "ab": 3}, unk_token="?"), "?")
    as_text = tokenising.as_text(fast)
    assert as_text.marks == {0, 1}
    assert as_text("ab ŋ ab </s>") == [0, 3, 2, 3, *[2] * 3, 1]  # "</", "s" and ">"


def test_threads_that_encode_otherwise_do_not_disturb_one_another(tokenizer):
    encode, wrong = tokenising.encoder(tokenizer, "folder"), []

    def run(encode, expected):
        wrong.extend(1 for _ in range(300) if encode(TEXT) != expected)

    jobs = [(encode, encode(TEXT)), (tokenizer.encode, tokenizer.encode(TEXT))]
    threads = [threading.Thread(target=run, args=job) for job in jobs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Network:
    channels = 3
    num_classes = 2
    context_length = 512
    encodes_prompts = False

    def __init__(self, reads, classifies):
        self.reads, self.classifies = reads, classifies


def test_a_feed_of_texts_needs_a_tokenizer_at_once(tokenizer):
    config = read(defaults(model={"source": "none"}, data={"source": "stdlib"}))
    for classifies in (False, True):
        with pytest.raises(ValueError, match="no tokenizer, .* put its tokenizer.json beside"):
            feed.make(config, Network("tokens", classifies), None)
    feed.make(config, Network("images", True), None)


@pytest.mark.parametrize(
    ("classifies", "message"),
    [
        (False, "does not say which token ends a text; give eos_token_id in its config.json"),
        (True, "does not say which token fills short rows; give pad_token_id in its config"),
    ],
)
def test_a_feed_of_texts_needs_named_tokens_at_once(classifies, message):
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    config = read(defaults(model={"source": "none"}, data={"source": "stdlib"}))
    with pytest.raises(ValueError, match=message):
        feed.make(config, Network("tokens", classifies), fast)
