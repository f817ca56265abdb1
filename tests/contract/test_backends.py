# SPDX-License-Identifier: Apache-2.0
"""Several back ends on one host: whatever servers are called and wherever they are, each gets exactly its own messages.

Every message has a value of its own, and every listener keeps what it was given. Servers are processes of all models.
"""

from __future__ import annotations

import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest

from tests.contract.harness import MODELS, Directory, Fleet, Raised, Worker, following, wait_until

pytestmark = pytest.mark.slow

TAG = "backends"


@dataclass(frozen=True)
class Listener:
    label: str
    worker: Worker
    topic: str
    server: str
    exchange: str | None = None

    def hears(self, topic: str, server: str | None, exchange: str | None) -> bool:
        return (self.topic, self.exchange) == (topic, exchange) and server in (None, self.server)


class Cloud:
    """A client, listeners, and a ledger of what was sent and of who may get it."""

    def __init__(self, client: Worker, url: str) -> None:
        # Before several threads want it, of which each would make one.
        client.run("open_transport", url=url, tag=TAG)
        self.client = client
        self.url = url
        self.listeners: list[Listener] = []
        self._numbers = iter(range(1_000_000))
        self._outbox: list[dict[str, Any]] = []
        # Those that go to one listener: which it may be. Those that go to all: which those are.
        self._one: dict[str, Callable[[Listener], bool]] = {}
        self._all: dict[str, list[Listener]] = {}
        # What those have seen that were stopped.
        self._ended: list[tuple[Listener, list[str]]] = []

    def serve(self, worker: Worker, *targets: tuple[str, ...]) -> list[Listener]:
        """Have it listen to each (topic, server), or (topic, server, exchange)."""
        new = [Listener(f"{next(self._numbers)}", worker, *target) for target in targets]
        fields = [
            {"url": self.url, "label": each.label, "topic": each.topic, "server": each.server, "exchange": each.exchange}
            for each in new
        ]
        worker.run("backend_scenarios.serve", listeners=fields)
        self.listeners += new
        return new

    def end(self, listener: Listener) -> None:
        self._ended.append((listener, listener.worker.run("backend_scenarios.end", label=listener.label)))
        self.listeners.remove(listener)

    def lose(self, listener: Listener, seen: list[str]) -> None:
        """It was killed, when it had seen that."""
        self._ended.append((listener, seen))
        self.listeners.remove(listener)

    def add(
        self,
        kind: str,
        topic: str,
        server: str | None = None,
        exchange: str | None = None,
        *,
        count: int = 1,
        rest: float | None = None,
    ) -> None:
        """Make so many messages ready to be sent; ``rest`` is how long their handlers take."""
        for _ in range(count):
            value = f"{kind} {next(self._numbers)} to {server!a} of {topic!a}"[:200]
            if kind == "fanout":
                self._all[value] = [each for each in self.listeners if each.hears(topic, None, exchange)]
            else:
                self._one[value] = lambda listener: listener.hears(topic, server, exchange)
            method, args = ("note", {}) if rest is None else ("rest", {"seconds": rest})
            self._outbox.append(
                {
                    "kind": kind,
                    "topic": topic,
                    "server": server,
                    "exchange": exchange,
                    "method": method,
                    "args": {"value": value, **args},
                    "timeout": 30,
                }
            )

    def begin(self) -> Future[Any]:
        messages, self._outbox = self._outbox, []
        return self.client.begin("backend_scenarios.send", url=self.url, messages=messages)

    def send(self) -> None:
        self.begin().result(60)

    def who(self, topic: str, server: str | None = None, exchange: str | None = None, *, count: int = 1) -> list[str]:
        """The labels of those that answer so many calls, one after the other."""
        how = {"url": self.url, "topic": topic, "server": server, "exchange": exchange, "timeout": 20, "tag": TAG}
        answers: list[str] = self.client.run("calls", **how, method="who", count=count)
        return answers

    def nobody_hears(self, topic: str, server: str) -> bool:
        """A call says so; it must not be answered."""
        how = {"url": self.url, "topic": topic, "server": server, "tag": TAG, "method": "who", "at_least_once": True}
        return "MessageUndeliverable" in self.client.run("call_in_vain", **how)

    def waits_for(self, addresses: int, sent: Future[Any]) -> None:
        """What was sent, to so many addresses, waits for a server to appear."""
        wait_until(lambda: sent.done() or self._ask("waiting") == addresses, what=f"messages to {addresses} addresses")
        if sent.done():
            raise AssertionError(f"it did not wait: {sent.result()}")

    def some_seen(self, listener: Listener) -> None:
        wait_until(lambda: listener.worker.run("seen", label=listener.label), what="its first message")

    def check(self) -> None:
        """Everything has arrived, exactly once, where it was to, and nowhere else."""
        left: dict[str, int] = {}

        def settled() -> bool:
            left.clear()
            left.update(self._ask("unsettled"))
            return not left

        wait_until(settled, what=left)
        total = len(self._one) + sum(map(len, self._all.values()))
        seen = self._seen()

        def complete() -> bool:
            seen[:] = self._seen()
            return sum(len(values) for _, values in seen) >= total

        wait_until(complete, what=f"{total} messages")
        got = {id(listener): Counter(values) for listener, values in seen}
        for listener, values in seen:
            for value in values:
                own = self._one[value](listener) if value in self._one else listener in self._all[value]
                assert own, f"{value} came to {listener}"
        assert Counter(value for _, values in seen for value in values if value in self._one) == Counter(list(self._one))
        for value, listeners in self._all.items():
            assert [got[id(listener)][value] for listener in listeners] == [1] * len(listeners), value

    def _seen(self) -> list[tuple[Listener, list[str]]]:
        found: dict[str, list[str]] = {}
        for worker in {each.worker for each in self.listeners}:
            labels = [each.label for each in self.listeners if each.worker is worker]
            found |= worker.run("backend_scenarios.seen", labels=labels)
        return [(each, found[each.label]) for each in self.listeners] + self._ended

    def _ask(self, what: str) -> Any:
        return self.client.run(f"backend_scenarios.{what}", url=self.url)


@pytest.fixture
def cloud(fleet: Fleet, client_model: str, url: str) -> Cloud:
    return Cloud(fleet.get("client", client_model), url)


@pytest.fixture
def hosts(fleet: Fleet) -> list[Worker]:
    """A process of each model."""
    return [fleet.get("server", model) for model in MODELS]


def labels(listeners: Iterable[Listener]) -> list[str]:
    return [listener.label for listener in listeners]


# What went wrong in the historic driver: server names were split at '@', Neutron's workers could not share a name, and
# equal topics of two exchanges met.


def test_cinder_back_ends_of_one_host(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    """As Cinder has them: each back end listens to its name, and as the host to a topic that has its name."""
    names = ["host1@lvm-1", "host1@lvm-2", "host1@lvm-1#pool", "host1"]
    for name, worker in zip(names, [*hosts, hosts[-1]], strict=True):
        cloud.serve(worker, (topic, name, "cinder"), (f"{topic}.{name}", "host1", "cinder"))
    for name in names:
        for kind in ("call", "cast"):
            cloud.add(kind, topic, name, "cinder", count=3)
            cloud.add(kind, f"{topic}.{name}", None, "cinder")
            cloud.add(kind, f"{topic}.{name}", "host1", "cinder")
        cloud.add("fanout", f"{topic}.{name}", None, "cinder", count=2)
    for kind in ("call", "cast", "fanout"):
        cloud.add(kind, topic, None, "cinder", count=4)
    cloud.send()
    cloud.check()
    # Everybody has a share of what is for any of them.
    assert set(cloud.who(topic, None, "cinder", count=12)) == set(labels(cloud.listeners[::2]))


def test_each_cinder_back_end_is_told_of_by_its_name_alone(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    """One back end is not there: nobody else gets what is for it, however similar their names are."""
    names = ["host1@lvm-1", "host1@lvm-11", "host1", "host1@lvm", "host1@LVM-1", "lvm-1", "@lvm-1", "host1@"]
    for i, name in enumerate(names[1:]):
        cloud.serve(hosts[i % 3], (topic, name))
    for name in names[1:]:
        cloud.add("call", topic, name)
    cloud.send()
    assert cloud.nobody_hears(topic, names[0])
    for kind in ("call", "cast"):
        cloud.add(kind, topic, names[0])
    sent = cloud.begin()
    cloud.waits_for(1, sent)
    cloud.serve(hosts[0], (topic, names[0]))
    sent.result(40)
    cloud.check()


def test_neutron_workers_share_topic_and_name(cloud: Cloud, hosts: list[Worker], fleet: Fleet, topic: str) -> None:
    fourth = fleet.get("fourth", "threads")
    for worker in (*hosts, fourth):
        cloud.serve(worker, (topic, "node1", "neutron"), (f"{topic}-reports", "node1", "neutron"))
    workers = cloud.listeners[::2]
    for server in ("node1", None):
        answers = cloud.who(topic, server, "neutron", count=16)
        assert sorted(answers[:4]) == sorted(labels(workers))
        assert answers == answers[:4] * 4
    for each in (topic, f"{topic}-reports"):
        for kind in ("call", "cast", "fanout"):
            cloud.add(kind, each, "node1", "neutron", count=4)
            cloud.add(kind, each, None, "neutron", count=4)
    cloud.send()
    cloud.check()


def test_stopping_one_neutron_worker_loses_nothing(cloud: Cloud, hosts: list[Worker], fleet: Fleet, topic: str) -> None:
    for worker in (*hosts, fleet.get("fourth", "threads")):
        cloud.serve(worker, (topic, "node1"))
    leaving = cloud.listeners[0]
    for server in ("node1", None):
        for kind in ("call", "cast"):
            cloud.add(kind, topic, server, count=25, rest=0.01)
    sent = cloud.begin()
    cloud.some_seen(leaving)
    cloud.end(leaving)
    sent.result(40)
    cloud.check()
    answers = cloud.who(topic, "node1", count=6)
    assert answers == answers[:3] * 2
    assert sorted(answers[:3]) == sorted(labels(cloud.listeners))
    cloud.serve(hosts[0], (topic, "node1"))
    wait_until(lambda: set(cloud.who(topic, "node1", count=4)) == set(labels(cloud.listeners)), what="the new one's turn")
    cloud.add("call", topic, "node1", count=8)
    cloud.add("fanout", topic)
    cloud.send()
    cloud.check()


def test_equal_targets_in_two_exchanges(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    exchanges = ["nova", "neutron", "Nova", "nova ", None]
    for i, exchange in enumerate(exchanges):
        for worker in (hosts[i % 3], hosts[(i + 1) % 3]):
            cloud.serve(worker, *[(topic, "node1", exchange)] if exchange else [(topic, "node1")])
    for exchange in exchanges:
        for kind in ("call", "cast", "fanout"):
            cloud.add(kind, topic, "node1", exchange, count=2)
            cloud.add(kind, topic, None, exchange, count=2)
    cloud.send()
    cloud.check()


def test_nova_conductors_and_names_that_say_nothing(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    """Two workers are both ``conductor``/``ctl``; others are called by an address that is not theirs."""
    conductor, scheduler, compute = (f"{name}-{topic}" for name in ("conductor", "scheduler", "compute"))
    cloud.serve(hosts[0], (conductor, "ctl"), (compute, "0.0.0.0"))
    cloud.serve(hosts[1], (conductor, "ctl"), (scheduler, "ctl"))
    host, port, _ = hosts[0].run("address", url=cloud.url)
    elsewhere = f"{host}:{port}"
    cloud.serve(hosts[2], (scheduler, "0.0.0.0"), (compute, elsewhere), (compute, host))
    for topic_, server in ((conductor, "ctl"), (scheduler, "ctl"), (scheduler, "0.0.0.0"), (compute, "0.0.0.0")):
        for kind in ("call", "cast"):
            cloud.add(kind, topic_, server, count=4)
    for server in (elsewhere, host):
        cloud.add("call", compute, server, count=2)
    for topic_ in (conductor, scheduler, compute):
        cloud.add("fanout", topic_, count=2)
        cloud.add("call", topic_, count=4)
    cloud.send()
    cloud.check()
    assert sorted(cloud.who(conductor, "ctl", count=4)) == sorted(labels(cloud.listeners)[0:4:2] * 2)


def test_a_call_through_all_back_ends_ends_where_it_began(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    """Each calls the next one while its caller waits, and the last a listener of the first one's process."""
    names = [f"host1@lvm-{i}" for i in range(3)]
    for name, worker in zip(names, hosts, strict=True):
        cloud.serve(worker, (topic, name))
    last = cloud.serve(hosts[0], (topic, "host1"))[0]
    how: dict[str, Any] = {"url": cloud.url, "topic": topic, "server": "host1", "method": "who"}
    for name in reversed(names):
        how = {"url": cloud.url, "topic": topic, "server": name, "method": "relay", "args": {"how": how}}
    assert cloud.client.run("call", **how, tag=TAG) == last.label


# One process.


def test_one_process_listens_several_times(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    twice = cloud.serve(hosts[0], (topic, "host1@lvm-1"), (topic, "host1@lvm-1"))
    cloud.serve(hosts[0], (topic, "host1@lvm-2"), (f"{topic}.host1@lvm-1", "host1@lvm-1"))
    elsewhere = cloud.serve(hosts[1], (topic, "host1@lvm-1"))

    def send_to_all() -> None:
        for server in ("host1@lvm-1", "host1@lvm-2", None):
            for kind in ("call", "cast", "fanout"):
                cloud.add(kind, topic, server, count=4)
        cloud.add("call", f"{topic}.host1@lvm-1", "host1@lvm-1")
        cloud.send()
        cloud.check()

    send_to_all()
    assert set(cloud.who(topic, "host1@lvm-1", count=8)) == set(labels([*twice, *elsewhere]))
    cloud.end(twice[0])
    send_to_all()
    assert set(cloud.who(topic, "host1@lvm-1", count=8)) == set(labels([twice[1], *elsewhere]))
    cloud.serve(hosts[0], (topic, "host1@lvm-1"))
    send_to_all()


def test_a_back_end_calls_those_of_its_own_process(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    """The client is one of the back ends' processes."""
    cloud.serve(cloud.client, (topic, "host1@lvm-1"), (topic, "host1"))
    cloud.serve(hosts[0], (topic, "host1@lvm-2"), (topic, "host1"))
    for server in ("host1@lvm-1", "host1@lvm-2", "host1", None):
        for kind in ("call", "cast", "fanout"):
            cloud.add(kind, topic, server, count=3)
    cloud.send()
    cloud.check()


def test_a_full_back_end_does_not_hold_back_the_others_of_its_process(
    cloud: Cloud, directory: Directory, hosts: list[Worker], topic: str
) -> None:
    cloud.url = directory.url(listener_window=4)
    how = {"url": cloud.url, "topic": topic}
    hosts[0].run("serve", **how, server="host1@full", pool=1)
    hosts[0].run("serve", **how, server="host1@idle")
    held = cloud.client.begin("call", **how, tag=TAG, server="host1@full", method="hold", args={"value": -1}, timeout=60)
    wait_until(lambda: hosts[0].run("began", label="host1@full"))
    more = {"server": "host1@full", "method": "note", "values": list(range(20)), "timeout": 60}
    calls = cloud.client.begin("calls_together", **how, tag=TAG, **more)
    wait_until(lambda: hosts[0].run("counts", url=cloud.url).get("requests refused: busy", 0) > 8)
    began = time.monotonic()
    assert cloud.who(topic, "host1@idle", count=12) == ["host1@idle"] * 12
    assert time.monotonic() - began < 6  # each after a wait for the full one would take 12
    hosts[0].run("release", label="host1@full")
    assert held.result(40) == -1
    assert calls.result(40) == list(range(20))


# Names.

COMPOSED, APART = (unicodedata.normalize(form, "Größe-é-한") for form in ("NFC", "NFD"))
NAMES = [
    "node1",
    "node1@lvm",
    "node1@lvm#pool",
    "node1@",
    "@node1",
    "node1@lvm@lvm",
    "Node1",
    "NODE1",
    "\N{FULLWIDTH LATIN SMALL LETTER N}ode1",
    "node1 ",
    " node1",
    "node1\t",
    "node1\n",
    "node1\r\n",
    "node1\0",
    "node1\0lvm",
    "\0",
    " ",
    "\n",
    COMPOSED,
    APART,
    "ß",
    "ss",
    "\N{LATIN SMALL LETTER DOTLESS I}",
    "i\u200b",
    "\u202enode1",
    "\ufeffnode1",
    "🛰️",
    "x" * 2000,
    "x" * 1999,
    "x" * 1999 + "y",
    "é" * 2000,
    '{"server": "node1"}',
    '"node1"',
    "[1, 2]",
    "null",
    "1",
    "01",
    "\\u006eode1",
    "node%31",
    "node1\\",
    "*",
    "?",
    "node?",
    "node*",
    "[n]ode1",
    "node[0-9]",
    "%",
    "node_",
    "'; drop table listeners; --",
    "{node1}",
    "5:node1",
    "a/b",
    "../node1",
    "a:1",
    "a.b",
    ",",
    "$node1",
    "${node1}",
]
PLACES: dict[str, Callable[[str, str], tuple[str, str, str]]] = {
    "servers": lambda topic, name: (topic, name, "nova"),
    "topics": lambda topic, name: (topic + name, "node1", "nova"),
    "exchanges": lambda topic, name: (topic, "node1", name),
}


def test_the_names_are_different() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert COMPOSED != APART
    assert unicodedata.normalize("NFC", APART) == COMPOSED


@pytest.mark.parametrize("place", PLACES)
def test_names_are_opaque(cloud: Cloud, hosts: list[Worker], topic: str, place: str) -> None:
    """What is sent before its server is there waits for that very one; what comes later finds it."""
    targets = [PLACES[place](topic, name) for name in NAMES]
    for target in targets:
        cloud.add("call", *target)
    sent = cloud.begin()
    cloud.waits_for(len(targets), sent)
    for i, worker in enumerate(hosts):
        cloud.serve(worker, *targets[i::3])
    sent.result(60)
    for target in targets:
        cloud.add("cast", *target)
        if place != "servers":
            cloud.add("fanout", target[0], None, target[2])
    cloud.add("fanout", *targets[0])
    cloud.send()
    cloud.check()


def test_borders_of_names_are_kept(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    """What is the same when it is written down in one."""
    parts = ["a", "b", "c", "d"]
    targets = [
        (f"{topic}{mark.join(parts[i:j])}", mark.join(parts[j:]), f"{topic}{mark.join(parts[:i])}")
        for mark in ("", ".", ":", "/", "@", "1:", "\0", " ", '","')
        for i, j in ((1, 2), (1, 3), (2, 3))
    ]
    targets = list(dict.fromkeys(targets))
    for i, worker in enumerate(hosts):
        cloud.serve(worker, *targets[i::3])
    for target in targets:
        cloud.add("call", *target)
        cloud.add("cast", *target)
        cloud.add("fanout", *target)
    cloud.send()
    cloud.check()


@pytest.mark.parametrize("name", ["node1\ud800", "x" * 66_000], ids=["no-unicode", "too-long"])
def test_names_that_nobody_can_send_to_are_refused(cloud: Cloud, hosts: list[Worker], topic: str, name: str) -> None:
    (good,) = cloud.serve(hosts[0], (topic, "node1"))
    with pytest.raises(Raised, match="Unserializable"):
        hosts[0].run("serve", url=cloud.url, topic=topic, server=name, label="refused")
    with pytest.raises(Raised, match="Unserializable"):
        hosts[0].run("serve", url=cloud.url, topic=name, server="node1", label="refused")
    with pytest.raises(Raised, match="Unserializable"):
        cloud.client.run("call", url=cloud.url, topic=topic, server=name, method="who", tag=TAG)
    assert hosts[0].run("logged") == []
    assert cloud.who(topic, None, count=3) == [good.label] * 3


# Coming and going.


def test_a_back_end_is_restarted_while_similar_ones_go_on(cloud: Cloud, hosts: list[Worker], topic: str) -> None:
    name, similar = "host1@lvm-1", ["host1@lvm-10", "host1", "host1@lvm-1#pool"]
    (own,) = cloud.serve(hosts[0], (topic, name))
    for i, each in enumerate(similar):
        cloud.serve(hosts[i], (topic, each))
    # In its own process, and in others.
    for worker in (hosts[0], hosts[1], hosts[2]):
        for server in (name, *similar):
            for kind in ("call", "cast"):
                cloud.add(kind, topic, server, count=8, rest=0.005)
        sent = cloud.begin()
        cloud.some_seen(own)
        cloud.end(own)
        assert cloud.nobody_hears(topic, name)
        cloud.add("fanout", topic)
        cloud.send()
        for server in (name, *similar):
            cloud.add("call", topic, server)
        meanwhile = cloud.begin()
        cloud.waits_for(1, meanwhile)
        (own,) = cloud.serve(worker, (topic, name))
        sent.result(40)
        meanwhile.result(40)
    cloud.add("fanout", topic)
    cloud.send()
    cloud.check()


def test_a_back_end_is_killed_and_comes_back_elsewhere(
    cloud: Cloud, client_model: str, hosts: list[Worker], start: Callable[[str], Worker], topic: str
) -> None:
    name, similar = "host1@lvm-1", "host1@lvm-10"
    victim = start(following(client_model))
    (own,) = cloud.serve(victim, (topic, name))
    cloud.serve(hosts[0], (topic, similar))
    for server in (name, similar):
        cloud.add("call", topic, server, count=4)
        cloud.add("cast", topic, server, count=4)
    cloud.send()
    cloud.check()
    seen = victim.run("seen", label=own.label)
    victim.kill()
    cloud.lose(own, seen)
    # What is sent before that is known may have run for all that a client can tell.
    wait_until(lambda: cloud.nobody_hears(topic, name), what="the dead to be known as such")
    for server in (name, similar, None):
        cloud.add("call", topic, server, count=4)
        cloud.add("cast", topic, server, count=4)
    sent = cloud.begin()
    cloud.waits_for(1, sent)
    cloud.serve(hosts[1], (topic, name))
    sent.result(40)
    cloud.add("fanout", topic)
    cloud.send()
    cloud.check()
