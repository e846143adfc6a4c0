import copy
import pathlib

import pytest

from early_exit.pretrained import chat
from early_exit.pretrained.tokenizer import load_tokenizer

TINY_CHAT = pathlib.Path(__file__).parents[1] / "fixtures/tiny_chat"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_CHAT)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_turn_is_what_stands_before_its_words_the_words_and_their_end(tokenizer):
    before, end = chat.user_turn(tokenizer)
    assert tokenizer.decode(before) == "<|im_start|>user\n"
    assert tokenizer.decode([end]) == "<|im_end|>"
    words = tokenizer.encode("Who is in the class?")
    whole = chat.prompt(tokenizer, "Who is in the class?")
    assert whole[: len(before) + len(words) + 1] == [*before, *words, end]
    assert tokenizer.decode(whole).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_system_message_is_part_of_what_stands_before(tokenizer):
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    changed = with_template(tokenizer, system + tokenizer.chat_template)
    before, _ = chat.user_turn(changed)
    assert changed.decode(before) == f"{system}<|im_start|>user\n"


@pytest.mark.parametrize("after", ["", " [/INST]", "\n<|im_end|>"])
def test_words_that_no_token_ends_are_refused(tokenizer, after):
    changed = with_template(tokenizer, f"[INST] {{{{ messages[0].content }}}}{after}")
    assert chat.prompt(changed, "a")
    with pytest.raises(ValueError, match="ends a user's words with no token of its own"):
        chat.user_turn(changed)


def test_a_model_without_a_template_does_not_chat(tokenizer):
    silent = with_template(tokenizer, None)
    for asked in (chat.user_turn, lambda tokenizer: chat.prompt(tokenizer, "a")):
        with pytest.raises(ValueError, match="this model has no chat template"):
            asked(silent)


def test_special_tokens_and_those_that_end_an_answer(tokenizer):
    named = {tokenizer.decode([token]) for token in chat.special_ids(tokenizer)}
    assert named == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    ends = [tokenizer.decode([token]) for token in chat.stop_ids(tokenizer)]
    assert ends == ["<|endoftext|>", "<|im_end|>"]
