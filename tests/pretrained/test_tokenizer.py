import json

import pytest

from early_exit.pretrained.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    "pre, pieces",
    [
        # Digits are cut out one by one first, so the two spaces before them stay together.
        ("smollm", ["the", "Ġthe", "ĠĠ", "1", "2"]),
        ("refact", ["the", "Ġthe", "ĠĠ", "1", "2"]),
        ("gpt-2", ["the", "Ġthe", "Ġ", "Ġ", "1", "2"]),
        ("llama-bpe", ["the", "Ġthe", "Ġ", "Ġ", "1", "2"]),
        ("qwen2", ["the", "Ġthe", "Ġ", "Ġ", "1", "2"]),
    ],
)
def test_gguf_text_is_cut_as_the_file_says(write_gguf, pre, pieces):
    tokenizer = load_tokenizer(write_gguf(pre=pre))
    assert tokenizer.tokenize("the the  12") == pieces
    assert tokenizer.decode(tokenizer("the the  12")["input_ids"]) == "the the  12"


def test_gguf_special_tokens(write_gguf):
    tokenizer = load_tokenizer(write_gguf())
    assert len(tokenizer) == 101
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    ids = tokenizer("<|start|>the<think><|end|>")["input_ids"]
    assert ids == [1, tokenizer.convert_tokens_to_ids("the"), 2, 0]
    # The user-defined token is kept whole, but is text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "the<|end|>"


@pytest.mark.parametrize("add_bos", [False, True])
def test_gguf_begin_token_is_added_where_the_file_says(write_gguf, add_bos):
    ids = load_tokenizer(write_gguf(add_bos=add_bos))("the")["input_ids"]
    assert (ids[0] == 1) == add_bos and len(ids) == 1 + add_bos


def test_gguf_tokenizers_of_other_kinds_are_refused(write_gguf):
    for pre in ("tekken", "default"):  # llama.cpp's default is a rule of its own
        with pytest.raises(ValueError, match=f"says by '{pre}' how .*; supported are 'gpt-2', 'sm"):
            load_tokenizer(write_gguf(pre=pre))
    with pytest.raises(ValueError, match=r"tiny.gguf does not say \(tokenizer.ggml.pre\) how text"):
        load_tokenizer(write_gguf(pre=None))
    with pytest.raises(
        ValueError, match=r"tiny.gguf gives 2 types \(tokenizer.ggml.token_type\) to"
    ):
        load_tokenizer(write_gguf(types=[3, 3]))
    with pytest.raises(ValueError, match="tiny.gguf has the pad_token 101, which is none of"):
        load_tokenizer(write_gguf(more={"tokenizer.ggml.padding_token_id": 101}))
    with pytest.raises(ValueError, match="tokenizer model 'bert'; only byte-level BPE"):
        load_tokenizer(write_gguf(model="bert"))
    with pytest.raises(ValueError, match="gives 0 scores .* to 101 tokens"):
        load_tokenizer(write_gguf(model="llama"))


def test_a_folder_keeps_the_rules_of_its_file(write_gguf, tmp_path, no_network):
    """Hub folders of SmolLM2 name a class whose own rules are others."""
    original = load_tokenizer(write_gguf())
    original.save_pretrained(tmp_path)
    config_path = tmp_path / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    config_path.write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = load_tokenizer(tmp_path)
    text = "<|start|>the  12<|end|>"
    assert loaded.tokenize(text) == original.tokenize(text)
    assert loaded.eos_token == "<|end|>" and loaded.chat_template == original.chat_template


def test_folders_without_a_readable_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match="tokenizer.model but no tokenizer.json; make one"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a readable tokenizer"):
        load_tokenizer(tmp_path)
