# SPDX-License-Identifier: Apache-2.0
"""What is known of the directory, and the choice of one server."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from green_zmq.routing import Entry, Node, Table, Topic, choose
from green_zmq.wire import Key

T, U = Topic("ex", "t"), Topic("ex", "u")


def node(name: str, **fields: object) -> Node:
    return Node(name.encode().ljust(16, b"."), "127.0.0.1", 5000, name, 1, "threads")._replace(**fields)


A, B, C = node("a"), node("b"), node("c")


def key(server: str = "", topic: Topic = T) -> Key:
    return Key(*topic, server)


def test_unknown_is_not_empty() -> None:
    table = Table()
    assert T not in table
    assert table.nodes(key()) is None
    assert table.update(T, [])
    assert T in table
    assert table.nodes(key()) == []
    assert table.nodes(key("x")) == []
    assert table.topics == [T]
    table.forget(T)
    assert table.nodes(key()) is None
    table.forget(T)


def test_update_tells_news() -> None:
    table = Table()
    assert table.update(T, [Entry("a", A), Entry("b", B)])
    assert not table.update(T, [Entry("b", B), Entry("a", A)]), "the order of the directory says nothing"
    assert not table.update(T, iter([Entry("a", A), Entry("b", B)]))
    assert table.update(T, [Entry("a", A)])
    assert table.update(T, [Entry("a", A._replace(port=6000))])
    assert table.nodes(key("b")) == []


def test_nodes_of_a_server_and_of_any() -> None:
    table = Table()
    table.update(T, [Entry("one", A), Entry("one", B), Entry("two", B), Entry("two", C), Entry("host@x#y", C)])
    assert set(table.nodes(key()) or ()) == {A, B, C}
    assert len(table.nodes(key()) or ()) == 3, "each once, however many names it has"
    assert set(table.nodes(key("one")) or ()) == {A, B}
    assert table.nodes(key("host@x#y")) == [C]
    assert table.nodes(key("host")) == []
    assert table.nodes(key("", U)) is None


def test_exchanges_are_apart() -> None:
    table = Table()
    table.update(Topic("one", "t"), [Entry("s", A)])
    table.update(Topic("two", "t"), [Entry("s", B)])
    assert table.nodes(Key("one", "t", "")) == [A]
    assert table.nodes(Key("two", "t", "s")) == [B]
    assert table.nodes(Key("", "t", "")) is None


def test_order_is_stable() -> None:
    table = Table()
    table.update(T, [Entry("s", C), Entry("s", A), Entry("s", B)])
    first = table.nodes(key())
    table.update(T, [Entry("s", B), Entry("s", C), Entry("s", A)])
    assert table.nodes(key()) == first


def test_several_servers_of_a_name_in_one_process_are_one_node() -> None:
    table = Table()
    table.update(T, [Entry("s", A), Entry("s", A)])
    assert table.nodes(key("s")) == [A]


def test_discard_a_node_everywhere() -> None:
    table = Table()
    table.update(T, [Entry("a", A), Entry("b", B)])
    table.update(U, [Entry("a", A)])
    assert set(table.discard(A.instance)) == {T, U}
    assert table.nodes(key()) == [B]
    assert table.nodes(key("", U)) == [], "it is known that nobody is left"
    assert table.discard(A.instance) == []


def test_discard_a_node_from_one_address() -> None:
    table = Table()
    table.update(T, [Entry("one", A), Entry("two", A), Entry("one", B)])
    table.update(U, [Entry("one", A)])
    assert table.discard(A.instance, key("one")) == [T]
    assert table.nodes(key("one")) == [B]
    assert table.nodes(key("two")) == [A]
    assert table.nodes(key("one", U)) == [A]
    assert table.discard(A.instance, key()) == [T]
    assert table.nodes(key()) == [B]
    assert table.nodes(key("", U)) == [A]


def test_discarded_node_comes_back_with_news() -> None:
    table = Table()
    table.update(T, [Entry("a", A)])
    table.discard(A.instance)
    assert table.update(T, [Entry("a", A)])
    assert table.nodes(key()) == [A]


@pytest.mark.parametrize(("host", "address"), [("10.0.0.1", "tcp://10.0.0.1:5000"), ("::1", "tcp://[::1]:5000")])
def test_address(host: str, address: str) -> None:
    assert node("a", host=host).address == address
    assert address in str(node("a", host=host))


ANY = Key("exchange", "topic", "")


@dataclass
class Server:
    name: str
    load: int = 0
    ready: bool = True

    def usable(self, key: Key, now: float) -> bool:
        return self.ready


def names(servers: list[Server], count: int, turn: int = 0) -> str:
    chosen = ""
    for _ in range(count):
        found = choose(servers, ANY, turn, 0.0)
        assert found is not None
        turn, server = found
        chosen += server.name
    return chosen


def test_nobody() -> None:
    assert choose([], ANY, 0, 0.0) is None
    assert choose([], ANY, 7, 0.0) is None
    assert choose([Server("a", ready=False), Server("b", ready=False)], ANY, 1, 0.0) is None


def test_idle_servers_take_turns() -> None:
    servers = [Server(n) for n in "abc"]
    assert names(servers, 9) == "abcabcabc"
    assert names(servers, 4, turn=1) == "bcab"
    assert names(servers, 4, turn=3) == "abca"


def test_equally_loaded_servers_take_turns() -> None:
    servers = [Server(n, 5) for n in "abc"]
    assert names(servers, 6) == "abcabc"


def test_fewest_outstanding_is_chosen() -> None:
    servers = [Server("a", 3), Server("b", 1), Server("c", 2)]
    assert names(servers, 3) == "bbb"
    servers[1].load = 2
    assert names(servers, 4) == "bcbc"


def test_unusable_are_passed_over() -> None:
    servers = [Server("a"), Server("b", ready=False), Server("c")]
    assert names(servers, 4) == "acac"
    servers[0].load = servers[2].load = 100
    assert names(servers, 2) == "ac"


def test_load_spreads_evenly() -> None:
    servers = [Server(n) for n in "abcde"]
    turn = 0
    for _ in range(23):
        found = choose(servers, ANY, turn, 0.0)
        assert found is not None
        turn, server = found
        server.load += 1
    assert sorted(s.load for s in servers) == [4, 4, 5, 5, 5]


def test_time_is_handed_on() -> None:
    class Later(Server):
        def usable(self, key: Key, now: float) -> bool:
            return now >= 10

    assert choose([Later("a")], ANY, 0, 9.0) is None
    assert choose([Later("a")], ANY, 0, 10.0) is not None


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=6),
    st.integers(0, 6),
)
def test_choice_is_always_of_the_fewest(loads: list[tuple[int, bool]], turn: int) -> None:
    servers = [Server(str(i), load, ready) for i, (load, ready) in enumerate(loads)]
    found = choose(servers, ANY, turn, 0.0)
    usable = [s for s in servers if s.ready]
    if not usable:
        assert found is None
        return
    assert found is not None
    following, server = found
    assert server.ready
    assert server.load == min(s.load for s in usable)
    assert servers[following - 1] is server
    ties = Counter(names(servers, 10 * len(usable), turn))
    assert max(ties.values()) - min(ties.values()) <= 1, "ties are taken in turn"
