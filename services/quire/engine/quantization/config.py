"""Which layers of a checkpoint are quantized and how: reads config.json, heeds --quantization."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.engine.models.errors import UnsupportedModel
from quire.engine.quantization.awq import Awq
from quire.engine.quantization.compressed import CompressedTensors
from quire.engine.quantization.gptq import Gptq
from quire.engine.quantization.rounded import Rounded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quire.engine.quantization.format import Format

SUPPORTED = "gptq and awq (4 or 8 bits), compressed-tensors (integer weights of 4 or 8 bits)"
ROUNDED_BITS = {"int8": 8, "int4": 4}
"""--quantization names that round a float checkpoint."""


@dataclass(frozen=True)
class Rule:
    """Layers whose name the pattern matches, and their format; None for layers left in floats."""

    pattern: re.Pattern[str]
    format: Format | None


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's linear layers are quantized: the first rule that matches counts, and a
    layer that none matches is in floats."""

    method: str
    rules: tuple[Rule, ...]
    head: Rounded | None = None
    """How a head of floats, tied to the embedding or not, is rounded while it loads."""

    def format_of(self, layer: str) -> Format | None:
        """The format of the layer of this name, None when it is in floats."""
        return next((rule.format for rule in self.rules if rule.pattern.search(layer)), None)

    @property
    def formats(self) -> list[Format]:
        """Every format that some layer may have."""
        return [rule.format for rule in self.rules if rule.format is not None]

    def as_rounded(self) -> Quantization:
        """The same bits and groups for weights that come as floats."""
        rules = tuple(
            Rule(rule.pattern, rule.format and Rounded(rule.format.bits, rule.format.group_size))
            for rule in self.rules
        )
        return Quantization(self.method, rules)


EVERY_LAYER = re.compile("")
HEAD_IN_FLOATS = Rule(re.compile("^lm_head$"), None)
HEAD_BITS = 8
"""With --quantization int8 and int4: four bits cost a head more than they gain it."""


def choose(asked: str | None, found: Quantization | None) -> Quantization | None:
    """What --quantization and the checkpoint make together. Raises ValueError when they differ."""
    if asked is None:
        return found
    if asked not in ROUNDED_BITS:
        method = asked.removesuffix("_marlin")
        if found is None or found.method != method:
            held = "floats" if found is None else found.method
            raise ValueError(
                f"--quantization {asked}: the checkpoint is in {held}; leave the option out to "
                "take what it says"
            )
        return found
    if found is not None:
        raise ValueError(
            f"--quantization {asked} rounds a checkpoint of floats, but this one is quantized "
            f"already ({found.method}): leave the option out"
        )
    layers = Rule(EVERY_LAYER, Rounded(ROUNDED_BITS[asked]))
    return Quantization(asked, (HEAD_IN_FLOATS, layers), head=Rounded(HEAD_BITS))


def parse_quantization(raw: dict[str, Any]) -> Quantization | None:
    """What config.json says of quantization. Raises UnsupportedModel, naming what is supported."""
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if not settings:
        return None
    method = str(settings.get("quant_method", "?"))
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
    if method not in readers:
        raise UnsupportedModel(
            f"quantization method {method!r} is not supported; supported: {SUPPORTED}, and "
            "--quantization int8 or int4 for checkpoints of floats"
        )
    return Quantization(method, tuple(readers[method](settings)))


def _refuse(what: str) -> None:
    raise UnsupportedModel(f"{what} is not supported; supported: {SUPPORTED}")


def _check_bits(bits: object, allowed: tuple[int, ...] = (4, 8)) -> int:
    if bits not in allowed:
        _refuse(f"quantization to {bits} bits")
    return int(str(bits))


def _group_size(value: object) -> int | None:
    """None where a row has one scale."""
    return None if value is None or int(str(value)) <= 0 else int(str(value))


def _skipped(names: Iterable[str] | None) -> list[Rule]:
    """Modules left in floats, by a part of their names."""
    return [Rule(re.compile(re.escape(name)), None) for name in names or ()]


# --- GPTQ -----------------------------------------------------------------------------------------


def _gptq(settings: dict[str, Any]) -> list[Rule]:
    rules = _skipped(settings.get("modules_to_not_convert"))
    for pattern, overrides in (settings.get("dynamic") or {}).items():
        sign, _, expression = pattern.rpartition(":")
        layer = re.compile(expression)
        skips = sign == "-" or not overrides
        rules.append(Rule(layer, None if skips else _gptq_layer(settings | overrides)))
    if not settings.get("lm_head", False):
        rules.append(HEAD_IN_FLOATS)
    return [*rules, Rule(EVERY_LAYER, _gptq_layer(settings))]


def _gptq_layer(settings: dict[str, Any]) -> Gptq:
    name = settings.get("checkpoint_format") or "gptq"
    if name not in ("gptq", "gptq_v2"):
        _refuse(f"GPTQ checkpoint format {name!r}")
    return Gptq(
        bits=_check_bits(settings.get("bits")),
        group_size=_group_size(settings.get("group_size")),
        permutes=bool(settings.get("desc_act", False)),
        zeros_less_one=name == "gptq",
    )


# --- AWQ ------------------------------------------------------------------------------------------


def _awq(settings: dict[str, Any]) -> list[Rule]:
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        _refuse(f"AWQ version {version!r}")
    _check_bits(settings.get("bits", settings.get("w_bit")), (4,))
    layer = Awq(
        group_size=_group_size(settings.get("group_size", settings.get("q_group_size"))),
        has_zeros=bool(settings.get("zero_point", True)),
    )
    skipped = _skipped(settings.get("modules_to_not_convert"))
    return [*skipped, HEAD_IN_FLOATS, Rule(EVERY_LAYER, layer)]


# --- compressed-tensors ---------------------------------------------------------------------------


def _compressed(settings: dict[str, Any]) -> list[Rule]:
    for name in ("kv_cache_scheme", "transform_config"):
        if settings.get(name):
            _refuse(f"compressed-tensors {name}")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        _refuse(f"compressed-tensors sparsity {sparsity!r}")
    rules = [Rule(_target(name), None) for name in settings.get("ignore") or ()]
    for group in (settings.get("config_groups") or {}).values():
        layer = _compressed_layer(group, group.get("format") or settings.get("format"))
        rules += [Rule(_target(name), layer) for name in group.get("targets") or ()]
    return rules


def _target(name: str) -> re.Pattern[str]:
    """A module's name, the kind of all linear layers, or an expression behind `re:`."""
    if name == "Linear":
        return EVERY_LAYER
    expression = name.removeprefix("re:") if name.startswith("re:") else f"{re.escape(name)}$"
    return re.compile(f"^(?:{expression})")


def _compressed_layer(group: dict[str, Any], name: str | None) -> CompressedTensors:
    scheme = group.get("weights") or {}
    if scheme.get("type", "int") != "int":
        _refuse(f"compressed-tensors weights of type {scheme['type']!r}")
    strategy = scheme.get("strategy") or ("group" if scheme.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        _refuse(f"compressed-tensors strategy {strategy!r}")
    packed = {"pack-quantized": True, "int-quantized": False, "naive-quantized": False}
    if name not in packed:
        _refuse(f"compressed-tensors format {name!r}")
    return CompressedTensors(
        bits=_check_bits(scheme.get("num_bits", 8)),
        group_size=_group_size(scheme.get("group_size")) if strategy == "group" else None,
        permutes=scheme.get("actorder") in ("group", "dynamic", True),
        has_zeros=not scheme.get("symmetric", True),
        is_packed=packed[str(name)],
    )
