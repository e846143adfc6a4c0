"""Which tokens end an answer: whatever place of a checkpoint says it, and out again."""

import json
import pathlib
import shutil

import pytest

from early_exit.pretrained.export import export_backbone
from early_exit.pretrained.load import load

TINY_CHAT = pathlib.Path(__file__).parents[1] / "fixtures/tiny_chat"
END_OF_TEXT, START, END = 0, 1, 2
SILENT = "{% for m in messages %}{{ m.content }}{% endfor %}"  # ends nothing with a token


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY_CHAT, tmp_path / "model")


def change(path, **entries):
    """Changes entries of a JSON file; None takes one away."""
    fields = json.loads(path.read_text()) if path.exists() else {}
    fields = {name: value for name, value in (fields | entries).items() if value is not None}
    path.write_text(json.dumps(fields))


def make_base(folder):
    """Nobody but the vocabulary says what ends an answer."""
    change(folder / "tokenizer_config.json", eos_token=None)
    (folder / "chat_template.jinja").write_text(SILENT)


def test_the_tokenizer_and_the_template(folder):
    assert load(str(folder)).generation.stop_ids == (END_OF_TEXT, END)
    (folder / "chat_template.jinja").write_text(SILENT.replace("}}", "}}<|im_start|>"))
    assert load(str(folder)).generation.stop_ids == (END_OF_TEXT, START, END)
    make_base(folder)
    assert load(str(folder)).generation.stop_ids == (END_OF_TEXT,)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("ends", "stop_ids"),
    [(5, (0, 5)), ([7, 5], (0, 5, 7)), ([], (0,)), (-1, (0,)), ([319], (0, 319))],
)
def test_numbers_and_lists_of_them(folder, file, ends, stop_ids):
    make_base(folder)
    change(folder / file, eos_token_id=ends)
    assert load(str(folder)).generation.stop_ids == stop_ids


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ends", [[2, 320], 10**9, "2", [2.0], [True], {"a": 1}])
def test_what_is_no_token_of_the_vocabulary_is_refused(folder, file, ends):
    change(folder / file, eos_token_id=ends)
    with pytest.raises(ValueError, match=r"config.*eos_token_id = .* is no token"):
        load(str(folder))


def test_a_damaged_file_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        load(str(folder))


def test_gguf_names_the_end_of_a_turn_and_of_a_message(write_gguf):
    more = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert load(str(write_gguf())).generation.stop_ids == (0,)
    assert load(str(write_gguf(more=more))).generation.stop_ids == (0, 5, 6)
    with pytest.raises(ValueError, match=r"tiny.gguf has eos_token_id = \[0, 101\], but 101 is no"):
        load(str(write_gguf(more={"tokenizer.ggml.eot_token_id": 101})))


def test_it_goes_out_as_it_came(folder, tmp_path, write_gguf):
    change(folder / "generation_config.json", eos_token_id=[2, 9], do_sample=True, top_p=0.9)
    gguf = str(write_gguf(more={"tokenizer.ggml.eot_token_id": 5}))
    for name, source in (("a", str(folder)), ("b", gguf)):
        first = load(source)
        export_backbone(
            tmp_path / name, first.config, first.params, first.tokenizer, first.generation
        )
        again = load(str(tmp_path / name)).generation
        assert again.stop_ids == first.generation.stop_ids and len(again.stop_ids) > 1
        assert again.stored == first.generation.stored | again.stored
    assert json.loads((tmp_path / "a/generation_config.json").read_text())["top_p"] == 0.9


@pytest.mark.parametrize("name", ["eos", "pad"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_tokenizer_that_names_no_tokens_has_them_from_the_configs(folder, file, name):
    """GPT-2 and BERT were published so."""
    (folder / "tokenizer_config.json").unlink()
    assert load(str(folder)).tokenizer.eos_token_id is None
    change(folder / file, **{f"{name}_token_id": [START] if name == "eos" else START})
    tokenizer = load(str(folder)).tokenizer
    assert getattr(tokenizer, f"{name}_token_id") == START
    # What its own files say comes first.
    shutil.copy(TINY_CHAT / "tokenizer_config.json", folder)
    assert load(str(folder)).tokenizer.eos_token_id == END
