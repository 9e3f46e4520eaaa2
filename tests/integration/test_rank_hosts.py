"""A replica whose ranks run on several hosts: here two addresses of this machine, with TLS.

Real processes of `quire worker --node-rank 1`; rank 0 is in this process. Hosts with addresses and
networks of their own are in `test_ray_rank_hosts`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from certificates import certificate_files
from parallel_models import SHARED
from test_parity import LENGTHS, generate, load, prompt, request
from test_tensor_parallel import ENDED_S, GQA, Deaf, wait_gone
from tiny_models import build

from quire.cluster.tls import tls_context
from quire.config.cluster import ClusterConfig
from quire.config.engine import EngineConfig
from quire.config.transfer import TransferConfig
from quire.coordinator import files
from quire.engine.engine import Engine
from quire.engine.loop import EngineLoop
from quire.engine.parallel import gathering, greeting, node
from quire.engine.parallel.channel import Channel, Kind
from quire.engine.parallel.gang import RankFailed
from quire.engine.parallel.kv import GangRanks
from quire.engine.parallel.spread import Spread
from quire.transfer.layout import BlockLayout, Shard
from quire.transfer.negotiate import Identity

TOKEN = "of the tests"
OPTIONS = {"device": "cpu", "kv_cache_memory_bytes": 8 << 20, "num_threads": 1, "max_num_seqs": 8}
START_S = 60


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(SHARED[GQA], folder, "float32")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    files = certificate_files(tmp_path_factory.mktemp("tls"), "cluster")
    return ClusterConfig(cluster_token=TOKEN, **files)


class OtherHost:
    """`quire worker --node-rank 1`, with these options."""

    def __init__(self, spread: Spread, folder: Path, degree: int = 2, **changes: str) -> None:
        flags = {
            "nnodes": spread.nodes, "node-rank": 1, "tensor-parallel-size": degree,
            "master-addr": spread.host, "master-port": spread.port, "drain-timeout-s": 5,
            "cluster-tls-cert": spread.cluster.cluster_tls_cert,
            "cluster-tls-key": spread.cluster.cluster_tls_key,
            "cluster-tls-ca": spread.cluster.cluster_tls_ca,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in flags.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quire", "worker", str(folder), *words],
            env=os.environ | {"QUIRE_CLUSTER_TOKEN": TOKEN} | changes,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it said."""
        said = self.process.communicate(timeout=START_S)[1]
        return self.process.returncode, said


@contextmanager
def other_host(spread: Spread, folder: Path, **changes):
    host = OtherHost(spread, folder, **changes)
    try:
        yield host
    finally:
        host.process.kill()
        host.process.wait()
        host.process.stderr.close()


@contextmanager
def engine_on_two_hosts(folder: Path, cluster: ClusterConfig, degree: int = 2, **changes: str):
    spread = Spread(2, "127.0.0.1", free_port(), cluster)
    with other_host(spread, folder, degree=degree, **changes) as host:
        config = EngineConfig(model=str(folder), tensor_parallel_size=degree, **OPTIONS)
        engine = Engine.load(config, lambda _: None, spread)
        try:
            yield engine, host
        finally:
            engine.model.gang.close()


def requests():
    return [request(i, prompt(i, length)) for i, length in enumerate(LENGTHS, start=1)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def running(request, folder, cluster):
    """Of 4 ranks, each host has two."""
    with engine_on_two_hosts(folder, cluster, request.param) as pair:
        yield pair


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_tokens_are_those_of_one_process(running, folder) -> None:
    engine, host = running
    assert engine.model.numerics == engine.runner.backend.numerics
    assert len(engine.model.gang.pids) == engine.config.tensor_parallel_size - 1
    assert host.process.pid not in engine.model.gang.pids
    assert generate(engine, requests())[0] == generate(load(folder), requests())[0]


def test_sleep_gives_back_the_cache_of_every_rank(running) -> None:
    engine, _ = running
    generate(engine, [request(100 + i, prompt(100 + i, 200), max_tokens=1) for i in range(24)])
    want = generate(engine, requests())[0]
    pids = (os.getpid(), *engine.model.gang.pids)
    before = [resident(pid) for pid in pids]
    freed = engine.drop_cache()
    after = [resident(pid) for pid in pids]
    falls = [b - a for b, a in zip(before, after, strict=True)]
    used = engine.config.kv_cache_memory_bytes // 4
    assert min(falls) > used
    assert freed > used * len(pids)
    assert generate(engine, requests())[0] == want


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        pytest.param(signal.SIGSTOP, "has given no sign of life", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_of_another_host_ends_all(folder, cluster, number, words) -> None:
    with engine_on_two_hosts(folder, cluster) as (engine, host):
        sink = Deaf()
        [pid] = engine.model.gang.pids
        EngineLoop(engine, sink).start()
        os.kill(pid, number)
        assert sink.died.wait(ENDED_S), "the engine goes on"
        assert isinstance(sink.error, RankFailed)
        assert f"rank 1 (pid {pid} on 127.0.0.1) {words}" in str(sink.error)
        code, said = host.ended()
        assert code == (node.LOST if number == signal.SIGKILL else node.ENDED), said
        wait_gone([pid])


def test_ranks_of_another_host_take_kv_blocks_under_the_name_that_it_advertises(
    folder, cluster
) -> None:
    """Certificates are for names, and so a pod's address will not do."""
    named = {"QUIRE_ADVERTISE": "decode-0-1.decode.models.svc:9000"}
    with engine_on_two_hosts(folder, cluster, **named) as (engine, _):
        model = engine.model
        layout = BlockLayout.of(
            model.runner.backend.layout,
            model=model.fingerprint.hex(),
            numerics=model.numerics,
            num_kv_heads=model.config.num_kv_heads,
        )
        identity = Identity(layout, Shard(0, 2), "decode-0", 1, 1.0, TOKEN)
        config = TransferConfig(kv_host="0.0.0.0", cluster_token=TOKEN, kv_transports=("tcp",))
        (peer,) = GangRanks(model.gang.calls).start(config, identity, lambda *_: None)
        ((transport, address),) = peer.listeners
        assert transport == "tcp"
        assert address.rpartition(":")[0] == "decode-0-1.decode.models.svc"


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_lost_host_ends_all(folder, cluster, number) -> None:
    with engine_on_two_hosts(folder, cluster) as (engine, host):
        sink = Deaf()
        EngineLoop(engine, sink).start()
        os.kill(host.process.pid, number)
        assert sink.died.wait(ENDED_S), "the engine goes on"
        assert isinstance(sink.error, RankFailed)
        [pid] = engine.model.gang.pids
        deadline = time.monotonic() + ENDED_S
        while files.identity(pid) is not None:
            assert time.monotonic() < deadline, "a rank is left"
            time.sleep(0.05)
        assert host.ended()[0] == -signal.SIGKILL, "by its rank, if it was stopped"


def test_hosts_whose_kernels_differ_are_like_no_other_replica(folder, cluster) -> None:
    with engine_on_two_hosts(folder, cluster, QUIRE_CPU_ISA="generic") as (engine, _):
        own = engine.runner.backend.numerics
        assert engine.model.numerics.startswith(f"{own}/ranks-") == ("generic" not in own)


def test_ranks_of_another_host_end_with_rank_0(folder, cluster) -> None:
    """It was told to end, which it does when rank 0 has drained."""
    with engine_on_two_hosts(folder, cluster) as (engine, host):
        host.process.terminate()
        assert len(generate(engine, requests())[0]) == len(LENGTHS)
        engine.model.gang.close()
        assert host.ended()[0] == node.ENDED
        wait_gone(engine.model.gang.pids)


def test_a_host_that_still_waits_ends_at_once(folder, cluster) -> None:
    with other_host(Spread(2, "127.0.0.1", free_port(), cluster), folder) as host:
        assert "waits for rank 0" in host.process.stderr.readline()
        host.process.terminate()
        assert host.ended()[0] == node.ENDED


def greeted_host(spread: Spread) -> Channel:
    """A host that has introduced itself, and does nothing more."""
    deadline = time.monotonic() + START_S
    while not _listens(spread.port):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sock = socket.create_connection((spread.host, spread.port))
    channel = Channel.over(sock, tls_context(spread.cluster, server=False), is_dialler=True)
    greeting.introduce(channel, TOKEN, node=1)
    return channel


def test_a_host_that_hangs_before_its_ranks_run_ends_all(folder, cluster, monkeypatch) -> None:
    monkeypatch.setattr(gathering, "LOADING_SILENCE_S", 1.0)
    spread = Spread(2, "127.0.0.1", free_port(), cluster)
    config = EngineConfig(model=str(folder), tensor_parallel_size=2, **OPTIONS)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(greeted_host, spread)
        with pytest.raises(RankFailed, match=r"host 1 \(127.* has given no sign of life for 1 s"):
            Engine.load(config, lambda _: None, spread)
        hanging.result().close()


def test_a_host_says_how_its_rank_ended_before_it_connected(folder, cluster) -> None:
    spread = Spread(2, "127.0.0.1", free_port(), cluster)
    config = EngineConfig(model=str(folder), tensor_parallel_size=2, **OPTIONS)

    def lose_a_rank() -> None:
        with contextlib.closing(greeted_host(spread)) as channel:
            channel.send(Kind.BEAT)
            channel.send_json(Kind.ENDED, {"rank": 1, "how": "was killed by SIGKILL"})

    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(lose_a_rank)
        with pytest.raises(RankFailed, match=r"host 1 .* says that rank 1 was killed by SIGKILL"):
            Engine.load(config, lambda _: None, spread)
        lost.result()


def test_a_host_shows_that_it_lives_before_its_ranks_run(folder, cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        spread = Spread(2, *listener.getsockname(), cluster)
        with other_host(spread, folder) as host:
            tls = tls_context(cluster, server=True)
            channel = Channel.over(listener.accept()[0], tls, is_dialler=False)
            assert greeting.receive(channel, lambda _: TOKEN) is not None
            assert [channel.receive()[0] for _ in range(3)] == [Kind.BEAT] * 3
            channel.close()
            assert host.ended()[0] == node.LOST


def test_another_token_is_refused_and_the_right_one_still_welcome(folder, cluster) -> None:
    spread = Spread(2, "127.0.0.1", free_port(), cluster)
    engines: list[Engine] = []
    config = EngineConfig(model=str(folder), tensor_parallel_size=2, **OPTIONS)
    loading = threading.Thread(
        target=lambda: engines.append(Engine.load(config, lambda _: None, spread))
    )
    loading.start()
    with other_host(spread, folder, QUIRE_CLUSTER_TOKEN="another") as stranger:
        code, said = stranger.ended()
    assert code == node.CANNOT_SERVE
    assert "does not know this cluster's token" in said
    with other_host(spread, folder):
        loading.join(START_S)
        assert len(generate(engines[0], requests())[0]) == len(LENGTHS)
        engines[0].model.gang.close()


def test_other_files_under_the_same_name_are_refused(folder, cluster, tmp_path) -> None:
    """Each host looks for the model itself: here one with another home."""
    other = tmp_path / "model"
    build(SHARED[GQA], other, "bfloat16")
    spread = Spread(2, "127.0.0.1", free_port(), cluster)
    link = tmp_path / "link"
    link.symlink_to(folder)
    config = EngineConfig(model=str(link), tensor_parallel_size=2, **OPTIONS)
    errors: list[Exception] = []

    def load_it() -> None:
        try:
            Engine.load(config, lambda _: None, spread)
        except ValueError as error:
            errors.append(error)

    loading = threading.Thread(target=load_it)
    loading.start()
    deadline = threading.Event()
    while not _listens(spread.port):
        deadline.wait(0.05)
    link.unlink()
    link.symlink_to(other)
    with other_host(spread, folder):
        loading.join(START_S)
    assert "is not what rank 0 has under this name" in str(errors[0])


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_ranks_that_hosts_cannot_share_are_refused(folder) -> None:
    config = EngineConfig(model=str(folder), tensor_parallel_size=2, **OPTIONS)
    with pytest.raises(ValueError, match="cannot be split evenly over 3 hosts"):
        Engine.load(config, lambda _: None, Spread(3, "127.0.0.1", free_port()))


def test_an_address_of_another_host_is_refused(folder) -> None:
    config = EngineConfig(model=str(folder), tensor_parallel_size=2, **OPTIONS)
    with pytest.raises(OSError, match=r"192\.0\.2\.1:29501 cannot be listened on .* --master-addr"):
        Engine.load(config, lambda _: None, Spread(2, "192.0.2.1", 29501))
