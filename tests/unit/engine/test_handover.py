"""Cached blocks between two pools: held while they move, found afterwards, never leaked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.engine.kv.pool import BlockPool
from quire.engine.scheduler.handover import Handover, Link


def chain(*names: str) -> list[Link]:
    hashes = [name.encode().ljust(16, b".") for name in names]
    return [Link(h, p) for h, p in zip(hashes, [b"root", *hashes], strict=False)]


def cached(pool: BlockPool, links: list[Link]) -> list[int]:
    blocks = pool.allocate(len(links))
    for block, link in zip(blocks, links, strict=True):
        pool.register(block, link.block_hash, link.parent)
    pool.release(blocks)
    return blocks


def test_parked_and_asked_for_blocks_are_not_evicted() -> None:
    pool = BlockPool(4)
    handover = Handover(pool, 0)
    links = chain("a", "b")
    blocks = cached(pool, links)
    handover.park("parked", blocks)
    assert handover.find("job", [b"?" * 16, links[1].block_hash]) == [(1, blocks[1])]
    pool.release(pool.allocate(2))
    assert pool.num_available == 2
    handover.release("parked")
    pool.allocate(3)
    assert pool.match([links[1].block_hash]) == [blocks[1]]
    handover.release("job")
    handover.release("job")
    pool.check_integrity()
    assert len(handover) == 0


def test_what_is_here_is_held_and_not_taken_again() -> None:
    pool = BlockPool(8)
    handover = Handover(pool, 1)
    links = chain("a", "b", "c", "d")
    [here] = cached(pool, links[:1])
    wanted = handover.prepare("job", [*links, *links])
    assert [link for link, _ in wanted] == links[1:]
    assert pool.counts().owned == 4
    handover.register(wanted[:2])
    handover.release("job")
    pool.check_integrity()
    assert pool.match([link.block_hash for link in links]) == [here, wanted[0][1], wanted[1][1]]
    assert pool.counts().owned == 0


def test_running_requests_keep_what_they_were_promised() -> None:
    pool = BlockPool(8)
    pool.promised = 3
    assert len(Handover(pool, 2).prepare("job", chain(*"abcdefgh"))) == 3
    pool.check_integrity()


def test_without_a_cache_nothing_is_taken() -> None:
    pool = BlockPool(4, caching=False)
    assert Handover(pool, 0).prepare("job", chain("a", "b")) == []
    assert pool.counts().owned == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["park", "find", "prepare", "register", "release"]),
            st.sampled_from(["x", "y"]),
            st.text("abcdefgh", min_size=1, max_size=6),
        ),
        max_size=40,
    )
)
def test_any_order_leaves_every_block_accounted_for(actions) -> None:
    pool = BlockPool(8)
    handover = Handover(pool, 0)
    prepared: dict[str, list] = {"x": [], "y": []}
    for action, key, names in actions:
        links = chain(*dict.fromkeys(names))
        if action == "park":
            handover.park(key, pool.match([link.block_hash for link in links]))
        elif action == "find":
            handover.find(key, [link.block_hash for link in links])
        elif action == "prepare":
            prepared[key] += handover.prepare(key, links)
        elif action == "register":
            handover.register(prepared[key])
            prepared[key] = []
        else:
            handover.release(key)
            prepared[key] = []
        pool.check_integrity()
    handover.release("x")
    handover.release("y")
    pool.check_integrity()
    assert pool.counts().owned == 0
