# SPDX-License-Identifier: Apache-2.0
"""The direction of dependencies, from the imports themselves."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import green_zmq

PACKAGE = Path(green_zmq.__file__).parent
PURE = {"batches", "errors", "wire", "routing", "delivery"}
# What would make a module depend on a clock, a thread, chance or the machine it runs on.
IMPURE = {
    "asyncio", "concurrent", "datetime", "logging", "multiprocessing", "os", "pathlib", "queue", "random", "secrets", "select",
    "selectors", "signal", "socket", "subprocess", "sys", "threading", "time", "uuid", "zmq", "eventlet", "gevent", "redis",
    "oslo_config", "_thread", "_queue",
}  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """The modules of the package by their name within it; packages by their own name.

    Those of the benchmark are programs that use it, as services do.
    """
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "bench":
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(tree: ast.AST, *, lazy: bool) -> list[ast.Import | ast.ImportFrom]:
    """The imports that are run; those inside functions only if ``lazy``."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += statements(node, lazy=True) if lazy else []
        elif not (isinstance(node, ast.stmt) and for_types_only(node)):
            found += statements(node, lazy=lazy)
    return found


@cache
def imports(name: str, lazy: bool = True) -> frozenset[str]:
    """The full names that a module imports; ``from x import y`` counts as x, and as x.y where that is a module of ours."""
    found = set()
    for node in statements(ast.parse(modules()[name].read_text()), lazy=lazy):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        else:
            assert not node.level, f"{name} has a relative import"
            module = node.module or ""
            ours = {f"{module}.{alias.name}" for alias in node.names} & {f"green_zmq.{m}" for m in modules() if m}
            found |= ours
            if len(ours) < len(node.names):
                found.add(module)
    return frozenset(found)


def tops(name: str) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(name)}


def ours(name: str, lazy: bool = True) -> set[str]:
    """The modules of the package that a module imports."""
    return {i.partition(".")[2] for i in imports(name, lazy) if i.partition(".")[0] == "green_zmq"}


def who_imports(*libraries: str) -> set[str]:
    return {name for name in modules() if tops(name) & set(libraries)}


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_know_nothing_of_the_world(name: str) -> None:
    assert tops(name) & IMPURE == set()
    assert ours(name) <= PURE
    private = {i for i in imports(name) if i.startswith("oslo_messaging")}
    assert private <= {"oslo_messaging", "oslo_messaging.exceptions", "oslo_messaging.transport"}


def test_pure_modules_are_in_layers() -> None:
    assert ours("errors") == set()
    assert ours("wire") <= {"errors"}
    assert ours("routing") <= {"errors", "wire"}


def test_client_and_server_do_not_know_each_other() -> None:
    client, server = below("client"), below("server")
    assert "server" not in client
    assert "client" not in server
    for name in client | server:
        assert name not in ("engine", "driver", "servers")


def test_calls_and_notifications_do_not_know_each_other() -> None:
    calls, notifications = below("client") | below("server"), below("notifier") | below("subscriber")
    assert not calls & {"notifier", "subscriber"}
    assert not notifications & {"client", "server", "connections", "resolver", "router", "engine", "driver"}


def below(name: str) -> set[str]:
    """Everything of ours that a module depends on."""
    found: set[str] = set()
    todo = [name]
    while todo:
        for module in ours(todo.pop()) & modules().keys():
            if module not in found:
                found.add(module)
                todo.append(module)
    return found


def test_only_executors_name_green_libraries() -> None:
    assert {name for name in who_imports("eventlet", "greenlet") if name != "executors.eventlet"} == set()
    assert {name for name in who_imports("gevent", "greenlet") if name != "executors.gevent"} == set()


def test_only_models_loop_and_connections_touch_sockets() -> None:
    """And who asks other processes for their figures, without a loop."""
    allowed = {"loop", "connections", "router", "inspection", *(name for name in modules() if name.startswith("executors"))}
    assert who_imports("zmq") <= allowed


def test_only_the_redis_modules_touch_redis() -> None:
    assert who_imports("redis", "valkey") <= {"redis", "directory.redis", "notifications.redis"}


def test_only_sqlite_modules_touch_sqlite() -> None:
    assert who_imports("sqlite3") <= {"database", "directory.sqlite", "notifications.sqlite"}


def test_only_the_driver_side_knows_drivers_and_servers_of_oslo_messaging() -> None:
    public = {"oslo_messaging.exceptions", "oslo_messaging.transport"}
    for name in modules():
        if name in ("server", "subscriber", "driver", "servers") or name.partition(".")[0] == "cli":
            continue
        deep = {i for i in imports(name) if i.startswith("oslo_messaging.")}
        assert deep <= public, name
        bare = "oslo_messaging" in imports(name)
        assert not bare or name == "errors", name


def test_only_config_reads_options() -> None:
    readers = {name for name in who_imports("oslo_config") if not name.startswith("cli")}
    assert readers <= {"config", "driver"}


def test_nothing_below_the_driver_knows_it() -> None:
    for name in modules():
        if name not in ("driver", "servers", "") and not name.startswith("cli"):
            assert not ours(name) & {"driver", "servers"}, name
            assert not any(i == "cli" or i.startswith("cli.") for i in ours(name)), name


def test_only_its_command_knows_the_benchmark() -> None:
    assert {name for name in modules() if any(each.partition(".")[0] == "bench" for each in ours(name))} == {"cli.bench"}


def test_models_directories_and_stores_stand_on_their_own() -> None:
    for name in modules():
        if name.startswith("executors"):
            assert ours(name) <= {"errors", "executors", "executors.base", "executors.workers"}, name
        if name.startswith("directory"):
            siblings = {"directory.base", "directory.processes"}
            assert ours(name) <= {"config", "database", "errors", "executors", "redis", "routing", "wire"} | siblings, name
        if name.startswith("notifications"):
            siblings = {"notifications.base", "notifications.scripts", "directory.processes"}
            assert ours(name) <= {"config", "database", "descriptors", "errors", "executors", "redis", "routing"} | siblings, (
                name
            )


def test_no_cycles() -> None:
    """Packages count as what their ``__init__`` imports. The package itself imports lazily, which is why it may."""
    graph = {name: (ours(name, lazy=bool(name)) & modules().keys()) - {name, ""} for name in modules()}
    graph[""] = ours("", lazy=False) & modules().keys()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for following in sorted(graph[name]):
                visit(following, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_driver_is_imported_without_the_libraries_of_models_and_directories() -> None:
    """There are services that make ``import eventlet`` fail on purpose."""
    done = run(
        """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("eventlet", "gevent", "redis"):
            raise ImportError(f"{name} is not for this service")

import oslo_messaging  # may import eventlet by itself, which is none of our business
from oslo_config import cfg
for name in [name for name in sys.modules if name.partition(".")[0] in ("eventlet", "gevent", "redis", "sqlite3")]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
import green_zmq.driver
transport = oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq+memory://")
print(sorted({"eventlet", "gevent", "redis", "sqlite3"} & set(sys.modules)))
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_else() -> None:
    done = run("import sys, green_zmq; print([m for m in ('oslo_messaging', 'zmq', 'eventlet') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


# A tour: the functions that get a message, from where oslo.messaging hands it over until libzmq has it.
TOUR = """
import inspect, json, sys, threading
{patch}
import oslo_messaging
from oslo_config import cfg
import green_zmq
from green_zmq.delivery import Outgoing

MARK = "a message that is followed"
tour, going, arrived = [], False, threading.Event()

def is_it(value):
    return isinstance(value, Outgoing) or (any(map(is_it, value)) if isinstance(value, tuple) else MARK in repr(value))

def watch(frame, event, argument):
    global going
    code = frame.f_code
    if going and event == "call" and "green_zmq" in code.co_filename:
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        if any(is_it(frame.f_locals[name]) for name in code.co_varnames[:count]):
            tour.append([code.co_filename.rpartition("green_zmq/")[2], code.co_name])
            going = tour[-1] != ["loop.py", "send"]

class Endpoint:
    def take(self, ctxt, value):
        if value == MARK:
            arrived.set()

threading.setprofile(watch)
sys.setprofile(watch)
conf = cfg.CONF  # oslo.messaging's client works with no other
conf([], project="tour")
server, sender = [oslo_messaging.get_rpc_transport(conf, "zmq+memory://") for _ in range(2)]
target = oslo_messaging.Target(topic="tour", server="here")
service = green_zmq.get_rpc_server(server, target, [Endpoint()], executor="{executor}")
service.start()
client = oslo_messaging.get_rpc_client(sender, oslo_messaging.Target(topic="tour"))
for _ in range(10):
    client.cast({{}}, "take", value="a message before")
going = True
client.cast({{}}, "take", value=MARK)
arrived.wait()
going = False
service.stop()
service.wait()
for transport in (sender, server):
    transport.cleanup()
print(json.dumps(tour))
"""


@pytest.mark.parametrize(
    ("patch", "executor"),
    [
        ("", "threading"),
        ("import eventlet; eventlet.monkey_patch()", "eventlet"),
        ("from gevent import monkey; monkey.patch_all()", "gevent"),
    ],
    ids=["threads", "eventlet", "gevent"],
)
def test_a_warm_cast_goes_through_few_functions(patch: str, executor: str) -> None:
    done = run(TOUR.format(patch=patch, executor=executor))
    assert done.returncode == 0, done.stderr
    tour = json.loads(done.stdout)
    assert tour[0] == ["driver.py", "send"]
    assert tour[-1] == ["loop.py", "send"]
    assert len(tour) <= 12, tour
    assert len({module for module, _ in tour}) <= 6, tour
