"""Messages of the first version: nothing that an older or a newer peer relies on may change.

Pods pair by capability and not by version, so both directions count: what an older peer wrote must
read as it was meant, and what a newer one added must pass through and do no harm.
"""

from __future__ import annotations

import json

import pytest
import wire
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from prometheus_client.registry import CollectorRegistry

from quire.cluster.rpc import Cluster
from quire.proto import worker_pb2
from quire.router import convert
from quire.router.fleet import Fleet
from quire.router.pods import PodWatcher, Surroundings
from quire.telemetry import metrics as m

OLD = wire.read_listing()
SAMPLES = json.loads(wire.SAMPLES.read_text())
MESSAGES = {
    d.full_name: message_factory.GetMessageClass(d)
    for file in wire.present()
    for d in wire.all_messages(file)
}


def test_no_field_service_or_value_was_changed_or_removed():
    assert len(OLD) > 300
    assert wire.breaks(OLD, wire.present()) == []


@pytest.mark.parametrize("name", SAMPLES)
def test_what_an_older_peer_wrote_reads_as_it_was_meant(name):
    message = MESSAGES[name].FromString(bytes.fromhex(SAMPLES[name]["bytes"]))
    assert wire.says(message) == SAMPLES[name]["says"]
    assert message.SerializeToString(deterministic=True).hex() == SAMPLES[name]["bytes"]


@pytest.mark.parametrize("name", SAMPLES)
def test_what_a_newer_peer_added_is_passed_on(name):
    written = bytes.fromhex(SAMPLES[name]["bytes"]) + wire.unknown_field()
    message = MESSAGES[name].FromString(written)
    assert wire.says(message) == SAMPLES[name]["says"]
    copy = MESSAGES[name]()
    copy.CopyFrom(message)
    assert copy.SerializeToString(deterministic=True).endswith(wire.unknown_field())


# ---- the check itself


def small(text: str):
    """A file with one message, and an enum, from what stands in its body."""
    from google.protobuf import text_format

    file = descriptor_pb2.FileDescriptorProto(name="x.proto", package="p", syntax="proto3")
    text_format.Parse(text, file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return [pool.FindFileByName("x.proto")]


def field(name="a", number=1, kind="TYPE_INT32", label="LABEL_OPTIONAL"):
    return f'field {{ name: "{name}" number: {number} type: {kind} label: {label} }}'


def message(*parts):
    return 'message_type { name: "M" ' + " ".join(parts) + " }"


BEFORE = wire.listing(small(message(field(), field("b", 2))))


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (message(field(), field("b", 2)), None),
        (message(field(), field("b", 2), field("c", 3)), None),
        (message(field("z"), field("b", 2)), "'int32 a' and is 'int32 z'"),
        (message(field(kind="TYPE_INT64"), field("b", 2)), "is 'int64 a'"),
        (message(field(label="LABEL_REPEATED"), field("b", 2)), "is 'repeated int32 a'"),
        (message(field("b", 1), field("a", 2)), "p.M 1 was"),
        (message(field()), "p.M 2 (int32 b) is gone"),
        (message(field(), "reserved_range { start: 2 end: 3 }"), "is gone"),
        (message(field(), 'reserved_range { start: 2 end: 3 } reserved_name: "b"'), None),
        ('message_type { name: "N" }', "p.M 1 (int32 a) is gone"),
    ],
    ids=[
        "same", "added", "renamed", "retyped", "repeated", "swapped", "removed", "number only",
        "reserved", "message removed",
    ],
)  # fmt: skip
def test_the_check_finds_what_breaks(after, found):
    problems = wire.breaks(BEFORE, small(after))
    assert bool(problems) == (found is not None)
    assert found is None or any(found in problem for problem in problems)


def test_the_check_sees_values_and_methods():
    enum = 'enum_type { name: "E" value { name: "ZERO" number: 0 } %s }'
    one = 'value { name: "ONE" number: 1 }'
    before = wire.listing(small(enum % one))
    assert wire.breaks(before, small(enum % one)) == []
    assert wire.breaks(before, small(enum % 'value { name: "TWO" number: 1 }'))
    assert wire.breaks(before, small(enum % ""))
    gone = 'reserved_range { start: 1 end: 1 } reserved_name: "ONE"'
    assert wire.breaks(before, small(enum % gone)) == []
    service = (
        'message_type { name: "M" } service { name: "S" method '
        '{ name: "Do" input_type: ".p.M" output_type: ".p.M" %s } }'
    )
    before = wire.listing(small(service % ""))
    assert wire.breaks(before, small(service % "server_streaming: true"))


# ---- what the parts do with words they do not know


@pytest.fixture
def watcher():
    """A router's view of one pod."""
    instruments = m.router_instruments(CollectorRegistry())
    fleet = Fleet(in_flight_ttl_s=2.0, stale_after_s=2.0)
    shared = Surroundings(fleet, lambda: 1.0, instruments, Cluster())
    return fleet, PodWatcher("pod", "127.0.0.1:1", shared)


def test_a_router_ignores_updates_of_a_later_version(watcher):
    fleet, watching = watcher
    model = worker_pb2.ModelInfo(model="m", incarnation=7, num_blocks=10, block_bytes=64)
    watching._take(worker_pb2.WorkerUpdate(model=model))
    watching._take(worker_pb2.WorkerUpdate.FromString(wire.unknown_field()))
    events = worker_pb2.CacheEvents(incarnation=7, snapshot=True)
    watching._take(worker_pb2.WorkerUpdate(cache_events=events))
    later = worker_pb2.CacheEvents(incarnation=7, first_sequence=1)
    later.events.add(kind=99, block_hash=b"0" * 16)
    watching._take(worker_pb2.WorkerUpdate(cache_events=later))
    watching._take(worker_pb2.WorkerUpdate(load=worker_pb2.Load(blocks_free=10)))
    assert fleet.states(1.0)["serving"] == 1
    assert fleet.index.count(fleet.pods["pod"].slot) == 0


def test_a_pod_of_the_first_version_is_for_everything_and_has_measured_nothing():
    report = convert.load_from(worker_pb2.Load(running=3))
    assert (report.prefill_weight, report.decode_weight) == (1.0, 1.0)
    assert report.transfer_rates == ()
