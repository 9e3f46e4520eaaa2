"""The wire as text and as bytes, so that a test can hold it against what older peers speak.

`python tests/support/wire.py` writes tests/data/wire anew from the present messages: after a
release, not before, since what is in these files can never change again.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
    from google.protobuf.message import Message

DATA = Path(__file__).parents[1] / "data" / "wire"
LISTING, SAMPLES = DATA / "v1.txt", DATA / "v1.json"
PROTOS = ("common", "transfer", "worker", "router", "coordinator")
_TYPES = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}


def present() -> list[FileDescriptor]:
    """The files as they are now."""
    from importlib import import_module

    return [import_module(f"quire.proto.{name}_pb2").DESCRIPTOR for name in PROTOS]


# ---- as text: one line for everything that a peer relies on


def listing(files: Iterable[FileDescriptor]) -> dict[str, str]:
    """What -> how it is on the wire. A field by its number, a value of an enum too."""
    lines: dict[str, str] = {}
    for file in files:
        for message in all_messages(file):
            for field in message.fields:
                lines[f"{message.full_name} {field.number}"] = _field(field)
        for enum in _all_enums(file):
            for value in enum.values:
                lines[f"{enum.full_name} {value.number}"] = value.name
        for service in file.services_by_name.values():
            for method in service.methods:
                asks = "stream " * method.client_streaming + method.input_type.full_name
                gives = "stream " * method.server_streaming + method.output_type.full_name
                lines[f"{service.full_name}/{method.name}"] = f"{asks} -> {gives}"
    return lines


def reserved(files: Iterable[FileDescriptor]) -> set[tuple[str, int | str]]:
    """(message or enum, number or name) that may not be used any more."""
    found: set[tuple[str, int | str]] = set()
    for file in files:
        for what in (*all_messages(file), *_all_enums(file)):
            is_enum = not hasattr(what, "fields")
            kind = descriptor_pb2.EnumDescriptorProto if is_enum else descriptor_pb2.DescriptorProto
            proto: Any = kind()
            what.CopyToProto(proto)
            for span in proto.reserved_range:
                found |= {(what.full_name, n) for n in range(span.start, span.end + is_enum)}
            found |= {(what.full_name, name) for name in proto.reserved_name}
    return found


def breaks(old: dict[str, str], files: Iterable[FileDescriptor]) -> list[str]:
    """What a peer of the old listing would misread, in words."""
    files = list(files)
    now, gone = listing(files), reserved(files)
    problems = []
    for what, how in old.items():
        if what in now:
            if now[what] != how:
                problems.append(f"{what} was {how!r} and is {now[what]!r}")
            continue
        owner, _, number = what.partition(" ")
        name = how.split()[-1]
        if not number or (owner, int(number)) not in gone or (owner, name) not in gone:
            problems.append(f"{what} ({how}) is gone; its number and name must be reserved")
    return problems


def _field(field: FieldDescriptor) -> str:
    kind = _TYPES[field.type]
    other = field.message_type or field.enum_type
    words = [kind if other is None else other.full_name]
    if field.is_repeated:
        words.insert(0, "repeated")
    elif field.containing_oneof is not None:
        words.insert(0, f"oneof {field.containing_oneof.name}")
    return " ".join([*words, field.name])


def all_messages(file: FileDescriptor) -> Iterator[Descriptor]:
    stack = list(file.message_types_by_name.values())
    while stack:
        message = stack.pop()
        yield message
        stack += message.nested_types


def _all_enums(file: FileDescriptor) -> Iterator[EnumDescriptor]:
    yield from file.enum_types_by_name.values()
    for message in all_messages(file):
        yield from message.enum_types


# ---- as bytes: each message with every field filled


def filled(descriptor: Descriptor, depth: int = 0) -> Message:
    """A message whose fields have values that tell them apart; of a oneof the last."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if field.message_type is not None and depth > 4:
            continue
        value = _value(field, depth)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[value.key] = value.value
        elif field.is_repeated:
            getattr(message, field.name).extend([value, value])
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(value)
        else:
            setattr(message, field.name, value)
    return message


def _value(field: FieldDescriptor, depth: int) -> Any:
    if field.message_type is not None:
        return filled(field.message_type, depth + 1)
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return True
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = f"{field.name} {field.number}"
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return field.number + 0.5
    return field.number * 1000 + 7


def samples(files: Iterable[FileDescriptor]) -> dict[str, dict[str, Any]]:
    """Message -> its bytes in hexadecimal, and what they say."""
    made = {}
    for file in files:
        for descriptor in all_messages(file):
            message = filled(descriptor)
            made[descriptor.full_name] = {
                "bytes": message.SerializeToString(deterministic=True).hex(),
                "says": says(message),
            }
    return made


def says(message: Message) -> dict[str, Any]:
    """A message's fields by name."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def unknown_field(number: int = 5000) -> bytes:
    """A field that nobody knows, as a later version might add it."""
    tag = number << 3  # a varint
    encoded = b""
    while tag > 0x7F:
        encoded += struct.pack("B", tag & 0x7F | 0x80)
        tag >>= 7
    return encoded + struct.pack("BB", tag, 42)


def write(files: list[FileDescriptor]) -> None:
    """Both files of tests/data/wire."""
    DATA.mkdir(parents=True, exist_ok=True)
    lines = (f"{what}: {how}\n" for what, how in sorted(listing(files).items()))
    LISTING.write_text("".join(lines))
    SAMPLES.write_text(json.dumps(samples(files), indent=1, sort_keys=True) + "\n")


def read_listing() -> dict[str, str]:
    """The committed one."""
    pairs = (line.partition(": ") for line in LISTING.read_text().splitlines())
    return {what: how for what, _, how in pairs}


if __name__ == "__main__":
    write(present())
