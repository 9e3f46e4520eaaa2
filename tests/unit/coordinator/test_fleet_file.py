"""A fleet file, and what is wrong with it, in the words of who wrote it."""

from __future__ import annotations

import re

import pytest

from quire.config.fleet import Fleet, fleet_from, read_fleet
from quire.config.transfer import TransferConfig
from quire.config.values import ConfigError
from quire.coordinator import assignments
from quire.coordinator.reconcile import Wanted


def content(**fields: object) -> dict:
    pools = [{"name": "both", "replicas": 2}]
    models = [{"name": "demo", "engine": {"max-model-len": 512}, "pools": pools}]
    return {"fleet": "f", "models": models} | fields


def make_fleet(token: str | None = None, **fields: object) -> Fleet:
    return fleet_from(content(**fields), TransferConfig(cluster_token=token))


def test_a_file_is_read(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "fleet: f\nray: local\nmodels:\n  - name: demo\n    pools:\n"
        "      - {name: decode, role: decode, node-label: quire.pool=decode, cpus: 0.5}\n"
    )
    fleet = read_fleet(path, TransferConfig())
    assert fleet.pools["decode"].labels == {"quire.pool": "decode"}
    assert fleet.model_of("decode").engine.model == "demo"
    assert read_fleet(path, TransferConfig(), "g").coordinator.fleet == "g"
    with pytest.raises(ConfigError, match="lower-case"):
        read_fleet(path, TransferConfig(), "G!")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"models": None}, "models: a list is needed"),
        ({"models": []}, "at least one"),
        ({"models": [{"name": "a"}]}, "models[0]: pools: a list"),
        ({"models": [{"name": "a", "pool": []}]}, "unknown key 'pool'; did you mean pools?"),
        ({"models": [{"engine": {"modl": "x"}, "pools": [{"name": "p"}]}]}, "did you mean model?"),
        ({"models": [{"pools": [{"name": "p", "rolle": "x"}]}]}, "did you mean role?"),
        ({"models": [{"pools": [{"name": "P 1"}]}]}, "lower-case letters"),
        ({"models": [{"pools": [{"name": "p", "node_label": "x"}]}]}, "KEY=VALUE"),
        ({"models": [{"pools": [{"name": "p", "cpus": 0}]}]}, "cpus and gpus"),
        ({"models": [{"pools": [{"name": "p"}, {"name": "p"}]}]}, "two pools are called p"),
        ({"ray": "10.0.0.1"}, "ray: an address is host:port"),
        ({"ray": "10.0.0.1:6379"}, "QUIRE_CLUSTER_TOKEN"),
        ({"listen": "0.0.0.0:9200"}, "QUIRE_CLUSTER_TOKEN"),
        ({"flet": "x"}, "did you mean fleet?"),
    ],
)
def test_mistakes_are_named(fields, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make_fleet(**fields)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*fleet.yaml"):
        read_fleet(tmp_path / "fleet.yaml", TransferConfig())


def test_the_ranks_of_a_pool_are_those_of_its_own_engine():
    pools = [{"name": "p", "gpus": 4, "engine": {"tensor_parallel_size": 4}}, {"name": "q"}]
    fleet = make_fleet(models=[{"engine": {"tensor_parallel_size": 2}, "pools": pools}])
    ranks = {each.pool: each.ranks for each in assignments.demands(fleet, {"p": 1, "q": 1})}
    assert ranks == {"p": 4, "q": 2}


def test_a_relative_model_is_refused_because_hosts_differ():
    engine = {"model": "./here"}
    fleet = make_fleet(models=[{"engine": engine, "pools": [{"name": "p"}]}])
    with pytest.raises(ValueError, match="absolute path"):
        list(assignments.model_paths(fleet))


def test_the_token_is_in_no_file_and_no_text():
    fleet = make_fleet(token="secret-of-all")
    told = assignments.assignment(fleet, Wanted("both-0", "demo", "d", "both"), 1)
    assert "secret-of-all" not in str(told.options) + repr(told)
    assert told.cluster["cluster_token"] == "secret-of-all"


def test_the_digest_changes_with_what_a_restart_is_needed_for():
    def digest(**fields: object) -> str:
        fleet = make_fleet(**fields)
        return assignments.digest(fleet, fleet.pools["both"])

    longer = [{"engine": {"max_model_len": 1024}, "pools": [{"name": "both", "replicas": 2}]}]
    more = [{"name": "demo", "engine": {"max_model_len": 512}, "pools": [{"name": "both"}]}]
    assert digest() == digest(models=more)
    assert len({digest(), digest(token="x"), digest(models=longer)}) == 3
