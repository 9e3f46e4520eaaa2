"""Model folders with random weights in real shapes, for speed comparisons: no hub, no download.

    python -m loadtest.shapes S M L --dir ~/.cache/quire-compare/models

S is a 10.5 M Llama, M a 135 M Llama (SmolLM's shape), L a 0.6 B Qwen3, 8B the 8 B Llama 3.1. The
tokenizer is the demo model's, filled up to the shape's vocabulary, so that every id is text in
every engine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

TINY_GAIN = 10.0
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    **SPECIAL,
}
QWEN3 = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}


def _sizes(hidden: int, layers: int, heads: tuple[int, int], inner: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": inner,
    }


SHAPES: dict[str, dict[str, Any]] = {
    # for tests of the tools themselves
    "tiny": LLAMA
    | _sizes(64, 2, (4, 2), 128)
    | {"head_dim": 32, "vocab_size": 8192, "tie_word_embeddings": True},
    "S": LLAMA
    | _sizes(256, 8, (8, 4), 768)
    | {"head_dim": 32, "vocab_size": 8192, "tie_word_embeddings": False},
    "M": LLAMA
    | _sizes(576, 30, (9, 3), 1536)
    | {"head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    "L": QWEN3
    | _sizes(1024, 28, (16, 8), 3072)
    | {"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    # Llama 3.1's
    "8B": LLAMA
    | _sizes(4096, 32, (32, 8), 14336)
    | {"head_dim": 128, "vocab_size": 128256, "rope_theta": 500000.0}
    | {"tie_word_embeddings": False},
}


def build(shape: str, folder: Path, seed: int = 0) -> Path:
    """Write the folder unless it is there; returns it."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from safetensors.torch import save_file

    from quire.engine.models.config import read_config
    from quire.engine.models.llama import weight_shapes
    from quire.engine.models.weights import DummyWeights

    describe(shape, folder)
    shapes = weight_shapes(read_config(folder))
    weights = DummyWeights(shapes, torch.bfloat16, seed)
    tensors = {name: weights.take(name) for name in shapes}
    if shape == "tiny":  # or its tied head repeats the last token, whatever the layers do
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "layers" in name:
                tensor.mul_(TINY_GAIN)
    unfinished = folder / "unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.rename(folder / "model.safetensors")
    return folder


def describe(shape: str, folder: Path) -> Path:
    """Write the folder without weights, for `--load-format dummy`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1) + "\n")
    generation = {"do_sample": False, **SPECIAL}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    _write_tokenizer(folder, SHAPES[shape]["vocab_size"])
    return folder


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from quire import demo

    source = Path(demo.path())
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    # entries that no merge reaches: only a model draws them
    for i in range(len(vocab), vocab_size):
        vocab[f"\u0120w{i}"] = i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = LLAMA["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    shutil.copy(source / "chat_template.jinja", folder)


def main() -> int:
    """Build the named shapes."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.shapes", description=__doc__)
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--dir", type=Path, required=True, help="parent of the folders")
    options = parser.parse_args()
    for shape in options.shapes:
        print(build(shape, options.dir / shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
