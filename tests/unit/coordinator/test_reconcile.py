"""Doing what is due, again and again, ends with what is wanted, one disturbance at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.coordinator.reconcile import (
    Place,
    Seen,
    SetRole,
    State,
    Stop,
    Wanted,
    decide,
    pod_names,
)

STATES = st.sampled_from([s for s in State if s is not State.STOPPING])
NAMES = [f"p-{i}" for i in range(4)]


def want(name: str, digest: str = "new", role: str = "both", model: str = "m") -> Wanted:
    return Wanted(name, model, digest, role)


def see(name: str, state: State = State.READY, digest: str = "new", role: str = "both") -> Seen:
    return Seen(name, "m", state, digest, role)


def test_the_last_pods_of_a_pool_go_first():
    assert pod_names("p", 2) == pod_names("p", 3)[:2]


def test_what_is_missing_is_placed_and_what_is_too_much_stopped():
    seen = {"p-1": see("p-1")}
    assert decide([want("p-0")], seen) == [Stop("p-1"), Place("p-0")]


def test_a_silent_supervisor_is_left_alone():
    assert decide([want("p-0")], {"p-0": see("p-0", State.UNREACHABLE)}) == []


def test_what_is_refused_goes_and_is_not_placed_again_until_it_is_forgotten():
    wanted, seen = [want("p-0"), want("p-1")], {"p-0": see("p-0", State.REFUSED), "p-1": see("p-1")}
    assert decide(wanted, seen, {"p-0"}) == [Stop("p-0")]
    del seen["p-0"]
    assert decide(wanted, seen, {"p-0"}) == []
    assert decide(wanted, seen) == [Place("p-0")]


def test_a_refused_replica_holds_up_the_update_of_those_that_serve():
    wanted, seen = [want("p-0"), want("p-1")], {"p-1": see("p-1", digest="old")}
    assert decide(wanted, seen, {"p-0"}) == []


def test_a_role_is_set_where_it_differs():
    seen = {"p-0": see("p-0", role="decode")}
    assert decide([want("p-0", role="prefill")], seen) == [SetRole("p-0", "prefill")]


def test_one_outdated_replica_goes_at_a_time_and_only_while_the_others_are_ready():
    wanted = [want(name) for name in NAMES[:3]]
    seen = {name: see(name, digest="old") for name in NAMES[:3]}
    assert decide(wanted, seen) == [Stop("p-0")]
    seen["p-0"] = see("p-0", State.STOPPING, "old")
    assert decide(wanted, seen) == []
    seen["p-0"] = see("p-0", State.STARTING)
    assert decide(wanted, seen) == []
    seen["p-0"] = see("p-0")
    assert decide(wanted, seen) == [Stop("p-1")]


def test_an_outdated_replica_that_serves_nobody_goes_at_once():
    wanted = [want("p-0"), want("p-1")]
    seen = {"p-0": see("p-0", State.STARTING), "p-1": see("p-1", State.FAILED, "old")}
    assert decide(wanted, seen) == [Stop("p-1")]


@given(
    st.sets(st.sampled_from(NAMES)),
    st.dictionaries(
        st.sampled_from(NAMES),
        st.tuples(STATES, st.sampled_from(["new", "old"]), st.sampled_from(["both", "decode"])),
    ),
)
def test_it_always_ends_with_what_is_wanted(wanted_names, found):
    wanted = [want(name) for name in sorted(wanted_names)]
    seen = {name: see(name, *about) for name, about in found.items()}
    for _ in range(40):
        actions = decide(wanted, seen)
        ready_before = {name for name, one in seen.items() if one.state is State.READY}
        outdated = [
            a
            for a in actions
            if isinstance(a, Stop)
            and a.name in wanted_names
            and seen[a.name].state is not State.REFUSED
        ]
        assert len(outdated) <= 1
        if outdated and outdated[0].name in ready_before:
            assert ready_before >= wanted_names, "a ready one goes while another is not ready"
        for action in actions:
            match action:
                case Place(name):
                    seen[name] = see(name, State.STARTING)
                case SetRole(name, role):
                    seen[name] = see(name, seen[name].state, seen[name].digest, role)
                case Stop(name):
                    del seen[name]
        seen = {name: see(name, State.READY, one.digest, one.role) for name, one in seen.items()}
        if not actions and len(ready_before) == len(seen):
            break
    assert seen == {name: see(name) for name in wanted_names}
