"""Quantized checkpoints: every format read back to the floats that its integers stand for."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from engines import model_config
from quantized_checkpoints import KINDS, Layer, as_int32, pack_rows

from quire.config.engine import EngineConfig
from quire.engine.models.errors import UnsupportedModel
from quire.engine.models.partition import check_degree
from quire.engine.quantization.config import choose, parse_quantization
from quire.engine.quantization.format import Part
from quire.engine.quantization.matrices import Matrices
from quire.engine.quantization.words import centred, unpack
from quire.kernels.quantized import dequantize, quantize
from quire.kernels.torch_quantized import pack_nibbles, unpack_nibbles

NAME = "model.layers.0.mlp.up_proj"
BY_NAME = {kind.name: kind for kind in KINDS}


class Tensors:
    """Weights in memory, each taken once."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.left = dict(tensors)

    def take(self, name, rows=None, columns=None):
        tensor = self.left.pop(name)
        if rows is not None:
            tensor = tensor[rows.start : rows.stop]
        return tensor if columns is None else tensor[:, columns.start : columns.stop]

    def ignore(self, name):
        self.left.pop(name, None)


def written(kind, n: int = 48, k: int = 136, seed: int = 0) -> tuple[Layer, dict]:
    """A layer, with scales as they were rounded for its file, and the tensors of that file."""
    torch.manual_seed(seed)
    layer = Layer.of(
        torch.randn(n, k), kind.bits, kind.group_size,
        symmetric=kind.symmetric, permuted=kind.permuted,
    )  # fmt: skip
    tensors = kind.write(layer)
    scales = tensors["scales"].T if "scales" in tensors else tensors["weight_scale"]
    layer = dataclasses.replace(layer, scales=scales.float())
    return layer, {f"{NAME}.{key}": tensor for key, tensor in tensors.items()}


def format_of(kind):
    return parse_quantization({"quantization_config": kind.config}).format_of(NAME)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_layer_is_read_as_it_was_written(kind):
    layer, tensors = written(kind)
    weights = Tensors(tensors)
    read = format_of(kind).read(weights, NAME, Part())
    assert torch.equal(dequantize(read), layer.floats)
    assert (read.zeros is None) == kind.symmetric
    assert (read.order is not None) == kind.permuted
    assert not weights.left, "a tensor of the layer was left over"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_rank_reads_its_rows(kind):
    for rows in (range(20), range(20, 48)):  # within words of 8
        layer, tensors = written(kind)
        read = format_of(kind).read(Tensors(tensors), NAME, Part(rows=rows))
        assert torch.equal(dequantize(read), layer.floats[rows.start : rows.stop])


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.permuted], ids=lambda kind: kind.name)
def test_a_rank_reads_its_columns_in_whole_groups(kind):
    for start, stop in pairwise((0, 64, 96, 136)):
        layer, tensors = written(kind)
        read = format_of(kind).read(Tensors(tensors), NAME, Part(columns=range(start, stop)))
        assert torch.equal(dequantize(read), layer.floats[:, start:stop])


def test_zero_points_of_zero_survive_gptqs_subtraction():
    """One is taken from a whole word, so a zero borrows from its neighbour, and gives it back."""
    torch.manual_seed(0)
    kind = BY_NAME["gptq8-asymmetric"]
    layer, tensors = written(kind)
    assert (layer.zeros == 0).any() or (layer.zeros > 0).all()
    positive = dataclasses.replace(layer, zeros=torch.zeros_like(layer.zeros))
    tensors |= {f"{NAME}.{key}": tensor for key, tensor in kind.write(positive).items()}
    read = format_of(kind).read(Tensors(tensors), NAME, Part())
    assert torch.equal(dequantize(read), positive.floats)


def test_awq_without_zero_points_counts_from_the_middle():
    config = BY_NAME["awq4"].config | {"zero_point": False}
    layer, tensors = written(dataclasses.replace(BY_NAME["awq4"], symmetric=True))
    del tensors[f"{NAME}.qzeros"]
    read = parse_quantization({"quantization_config": config}).format_of(NAME)
    assert torch.equal(dequantize(read.read(Tensors(tensors), NAME, Part())), layer.floats)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_unpack_to_what_was_packed(bits):
    values = torch.randint(0, 2**bits, (3, 40))
    assert torch.equal(unpack(pack_rows(values, bits), bits)[:, :40].long(), values)
    signed = centred(values.to(torch.uint8), bits)
    assert torch.equal(signed.long(), values - 2 ** (bits - 1))


def test_nibbles_keep_their_sign():
    values = torch.randint(-8, 8, (5, 7)).to(torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(values), 7), values)


def test_columns_that_form_no_groups_are_refused():
    layer, tensors = written(BY_NAME["gptq4-desc_act"])
    tensors[f"{NAME}.g_idx"][layer.group_of == 1] = 0
    matrices = Matrices(
        Tensors(tensors),
        parse_quantization({"quantization_config": BY_NAME["gptq4-desc_act"].config}),
    )
    with pytest.raises(ValueError, match=rf"{NAME}: its columns do not form groups of 32"):
        matrices.take(NAME)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.15)])
def test_rounding_stays_close(bits, error):
    torch.manual_seed(0)
    weight = torch.randn(64, 300)
    rounded = quantize(weight, bits, 128)
    assert rounded.scales.shape == (64, 3)
    rms = (dequantize(rounded) - weight).square().mean().sqrt()
    assert rms < error
    # never worse than the plain scale, largest / 7
    plain = weight.abs().view(64, -1)[:, :128].amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    part = weight[:, :128]
    simple = ((part / plain).round() * plain - part).square().sum(1)
    ours = (dequantize(rounded)[:, :128] - part).square().sum(1)
    assert (ours <= simple * (1 + 1e-5)).all()


def test_rounding_zeros_gives_zeros():
    assert not dequantize(quantize(torch.zeros(4, 64), 4, 32)).any()


# --- config.json and --quantization ---------------------------------------------------------------

COMPRESSED = BY_NAME["compressed4"].config


def weights_scheme(**changes):
    group = COMPRESSED["config_groups"]["group_0"]
    scheme = group["weights"] | changes
    return COMPRESSED | {"config_groups": {"group_0": group | {"weights": scheme}}}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "fp8"}, "'fp8' is not supported; supported: gptq and awq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes.*--quantization int8 or int4"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        (weights_scheme(type="float"), "float"),
        (weights_scheme(strategy="tensor"), "tensor"),
        (weights_scheme(num_bits=2), "2 bits"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "nvfp4"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(config, reason):
    with pytest.raises(UnsupportedModel, match=reason) as refused:
        parse_quantization({"quantization_config": config})
    assert "\n" not in str(refused.value)
    assert "supported: gptq and awq" in str(refused.value)


def test_layers_left_in_floats_are_known():
    awq = BY_NAME["awq4"].config | {"modules_to_not_convert": ["layers.0.self_attn"]}
    found = parse_quantization({"quantization_config": awq})
    assert found.format_of("model.layers.0.self_attn.q_proj") is None
    assert found.format_of("model.layers.1.self_attn.q_proj") is not None
    assert found.format_of("lm_head") is None
    gptq = BY_NAME["gptq4"].config | {
        "dynamic": {r"-:.*\.down_proj": {}, r"+:.*\.up_proj": {"bits": 8, "group_size": 64}}
    }
    found = parse_quantization({"quantization_config": gptq})
    assert found.format_of("model.layers.0.mlp.down_proj") is None
    up = found.format_of("model.layers.0.mlp.up_proj")
    assert (up.bits, up.group_size) == (8, 64)
    assert found.format_of("model.layers.0.mlp.gate_proj").bits == 4
    ignore = COMPRESSED | {"ignore": ["lm_head", "re:.*self_attn.*"]}
    found = parse_quantization({"quantization_config": ignore})
    assert found.format_of("model.layers.3.self_attn.o_proj") is None
    assert found.format_of("model.layers.3.mlp.gate_proj").bits == 4


def test_a_head_is_quantized_where_the_checkpoint_says_so():
    config = BY_NAME["gptq4"].config | {"lm_head": True}
    assert parse_quantization({"quantization_config": config}).format_of("lm_head") is not None


def test_the_option_and_the_checkpoint_must_agree():
    found = parse_quantization({"quantization_config": BY_NAME["gptq4"].config})
    assert choose(None, None) is None
    assert choose(None, found) is found
    assert choose("gptq", found) is found
    assert choose("gptq_marlin", found) is found
    with pytest.raises(ValueError, match="the checkpoint is in gptq; leave the option out"):
        choose("awq", found)
    with pytest.raises(ValueError, match="the checkpoint is in floats"):
        choose("awq", None)
    with pytest.raises(ValueError, match=r"quantized already \(gptq\)"):
        choose("int8", found)
    assert choose("int4", None).format_of(NAME).bits == 4
    assert choose("int4", None).format_of("lm_head") is None


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ValueError, match=r"one of int8, int4, gptq.*, not 'fp8'"):
        EngineConfig(quantization="fp8")
    assert EngineConfig(quantization=None).quantization is None


def test_degrees_that_would_cut_a_group_are_refused():
    def model(kind):
        return dataclasses.replace(
            model_config(64), num_heads=4, num_kv_heads=4, head_dim=16, intermediate_size=192,
            quantization=parse_quantization({"quantization_config": kind.config}),
        )  # fmt: skip

    check_degree(model(BY_NAME["gptq4"]), 2)
    with pytest.raises(ValueError, match="in groups of 32 columns, can be split over 1, 2 ranks"):
        check_degree(model(BY_NAME["gptq4"]), 4)
    check_degree(model(BY_NAME["compressed8-row"]), 4)
    with pytest.raises(ValueError, match=r"permuted \(desc_act\), can be split over 1 ranks"):
        check_degree(model(BY_NAME["gptq4-desc_act"]), 2)


def test_int32_words_wrap():
    assert as_int32(torch.tensor([0xFFFFFFFF, 2**31, 7])).tolist() == [-1, -(2**31), 7]
