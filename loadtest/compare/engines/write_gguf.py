"""A model folder of ours as a GGUF file: MODEL_FOLDER OUT.gguf. Needs numpy and gguf.

llama.cpp's own converter knows tokenizers by name and refuses ours, so the file has no vocabulary:
the comparison sends token ids. Matrices stay bfloat16, norms become float32.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(name):
    """llama.cpp's name of a tensor."""
    if name in NAMES:
        return NAMES[name]
    _, _, number, *rest = name.split(".")
    return f"blk.{number}.{LAYER_NAMES['.'.join(rest[:-1])]}.weight"


def tensors(path):
    """(name, bfloat16 values as uint16) of a safetensors file."""
    data = np.memmap(path, np.uint8, "r")
    length = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + length]))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, data[begin:end].view("<u2").reshape(entry["shape"])


def interleaved(values, heads):
    """Rows of a query or key matrix in the order of llama.cpp's rotary pairs for Llama."""
    rows, width = values.shape
    split = values.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows, width)


def write_settings(writer, config):
    """Shape and rotary base."""
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def main():
    """Convert."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(str(out), arch)
    write_settings(writer, config)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for name, values in tensors(folder / "model.safetensors"):
        if values.ndim == 1:
            writer.add_tensor(name_of(name), (values.astype(np.uint32) << 16).view(np.float32))
            continue
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, heads[name.split(".")[-2][0]])
        raw = np.ascontiguousarray(values).view(np.uint8)
        writer.add_tensor(name_of(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
