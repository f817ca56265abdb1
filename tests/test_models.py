# SPDX-License-Identifier: Apache-2.0
"""The choice of a concurrency model, in processes that are patched for one, for none, and for two."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

PATCHES = {
    "nothing": "",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "both": "from gevent import monkey; monkey.patch_all(); import eventlet; eventlet.monkey_patch()",
    # These have the library and even patch something, but threads are native.
    "eventlet without threads": "import eventlet; eventlet.monkey_patch(thread=False)",
    "imported only": "import eventlet, gevent.monkey",
}
ASKED = ("auto", "eventlet", "gevent", "threads", "threading")

_TRY_ALL = """
import json, sys
from green_zmq import executors
from green_zmq.errors import ModelError
results = {}
for asked in sys.argv[1:]:
    try:
        results[asked] = executors.choose(asked)
    except ModelError as error:
        results[asked] = ["ModelError", str(error)]
print(json.dumps(results))
"""

_REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LIBRARIES:
            raise ImportError(f"no {name} here")
import oslo_messaging  # may import eventlet by itself, which is none of our business
for name in [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
"""


def run(code: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cache
def choices(patch: str) -> dict[str, Any]:
    return run(PATCHES[patch] + _TRY_ALL, *ASKED)


@pytest.mark.parametrize(
    ("patch", "asked", "chosen"),
    [
        ("nothing", "auto", "threads"),
        ("nothing", "threads", "threads"),
        ("nothing", "threading", "threads"),
        ("nothing", "eventlet", "eventlet"),
        ("nothing", "gevent", "gevent"),
        ("eventlet", "auto", "eventlet"),
        ("eventlet", "eventlet", "eventlet"),
        ("gevent", "auto", "gevent"),
        ("gevent", "gevent", "gevent"),
        ("eventlet without threads", "auto", "threads"),
        ("imported only", "auto", "threads"),
    ],
)
def test_choice_that_works(patch: str, asked: str, chosen: str) -> None:
    assert choices(patch)[asked] == chosen


@pytest.mark.parametrize(
    ("patch", "asked"),
    [
        ("eventlet", "gevent"),
        ("eventlet", "threads"),
        ("eventlet", "threading"),
        ("gevent", "eventlet"),
        ("gevent", "threads"),
        ("gevent", "threading"),
    ],
)
def test_choice_that_cannot_work_says_what_to_change(patch: str, asked: str) -> None:
    kind, text = choices(patch)[asked]
    assert kind == "ModelError"
    assert f"patched by {patch}" in text
    assert f"name {patch}" in text
    assert asked in text or "threads" in text


@pytest.mark.parametrize("asked", ASKED)
def test_process_patched_by_both_is_refused(asked: str) -> None:
    kind, text = choices("both")[asked]
    assert kind == "ModelError"
    assert "eventlet" in text
    assert "gevent" in text
    assert "one of them" in text


@pytest.mark.parametrize("patch", ["nothing", "eventlet", "gevent"])
def test_detecting_imports_no_library(patch: str) -> None:
    code = (
        PATCHES[patch]
        + """
import sys
from green_zmq import executors
before = set(sys.modules)
executors.choose("auto")
import json
print(json.dumps(sorted({m.partition(".")[0] for m in set(sys.modules) - before} & {"eventlet", "gevent"})))
"""
    )
    assert run(code) == []


@pytest.mark.parametrize(
    ("patch", "name"),
    [
        ("nothing", "threads"),
        ("nothing", "eventlet"),
        ("nothing", "gevent"),
        ("eventlet", "eventlet"),
        ("gevent", "gevent"),
    ],
)
def test_model_has_what_it_must_have(patch: str, name: str) -> None:
    code = (
        PATCHES[patch]
        + f"""
import json, sys
from green_zmq import executors
from green_zmq.executors.base import Model
model = executors.load({name!r})
wanted = [n for n in dir(Model) if not n.startswith("_")] + list(Model.__annotations__)
assert model is executors.load({name!r})
others = {{"eventlet", "gevent"}} - {{{name!r}, {patch!r}}}
print(json.dumps([
    model.NAME,
    [n for n in wanted if not hasattr(model, n)],
    sorted(o for o in others if any(m == o for m in sys.modules)),
]))
"""
    )
    model, missing, others = run(code)
    assert model == name
    assert missing == []
    assert others in ([], ["eventlet"]), "libraries of oslo may import eventlet by themselves"


@pytest.mark.parametrize("name", ["eventlet", "gevent"])
def test_missing_library(name: str) -> None:
    code = (
        _REFUSE.replace("LIBRARIES", repr((name,)))
        + f"""
import json
from green_zmq import executors
from green_zmq.errors import ModelError
assert executors.choose("auto") == "threads"
assert executors.load("threads").NAME == "threads"
try:
    executors.load({name!r})
except ModelError as error:
    print(json.dumps(str(error)))
"""
    )
    text = run(code)
    assert f"executor={name}" in text
    assert f"no {name} here" in text
    assert f"pip install 'green_zmq[{name}]'" in text


@pytest.mark.parametrize("name", ["eventlet", "gevent"])
def test_missing_library_is_an_error_when_the_transport_is_made(name: str) -> None:
    """Not at the first message, when the service has long started."""
    code = (
        _REFUSE.replace("LIBRARIES", repr((name,)))
        + f"""
import json
import oslo_messaging
from oslo_config import cfg
from green_zmq.errors import ModelError
try:
    oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq+memory://?executor={name}")
except Exception as error:
    causes = [error, error.__cause__, error.__context__, getattr(error, "ex", None)]
    print(json.dumps(any(isinstance(e, ModelError) for e in causes)))
else:
    print(json.dumps("made"))
"""
    )
    assert run(code) is True


def test_choice_in_the_url_is_checked_when_the_transport_is_made() -> None:
    code = (
        PATCHES["gevent"]
        + """
import json
import oslo_messaging
from oslo_config import cfg
try:
    oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq+memory://?executor=eventlet")
except Exception as error:
    print(json.dumps(str(error) + str(getattr(error, "ex", ""))))
"""
    )
    assert "monkey-patched by gevent" in run(code)


_WORKERS = """
import gc, json, sys, weakref
MODEL = sys.argv[1]
if MODEL == "gevent":
    from gevent import monkey; monkey.patch_all()
    import gevent
    sleep, current, kill, Worker = gevent.sleep, gevent.getcurrent, gevent.kill, gevent.Greenlet
else:
    import eventlet; eventlet.monkey_patch()
    from eventlet.greenthread import GreenThread as Worker
    sleep, current, kill = eventlet.sleep, eventlet.getcurrent, eventlet.kill
import threading
from green_zmq import executors

class Message: ...

def run(*sizes):
    "So many at once, and then so many; how many green threads ran them, and how many at the same time at most."
    ran, now, most = [], [0], [0]
    def work(message):
        now[0] += 1
        most[0] = max(most[0], now[0])
        sleep(0.001)
        ran.append(id(current()))
        now[0] -= 1
    for size in sizes:
        for future in [executor.submit(work, Message()) for _ in range(size)]:
            future.result(10)
    return len(set(ran)), most[0]

def workers():
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, Worker) and not each.dead]

found = {}
before = workers()
executor = executors.load(MODEL).Executor(max_workers=3)
found["one after the other"] = run(*[1] * 10)
found["many"] = run(10, 10)
message = Message()
kept = weakref.ref(message)
executor.submit(lambda _: None, message).result(10)
del message
gc.collect()
found["forgotten"] = kept() is None
try:
    executor.submit(lambda: 1 / 0).result(10)
except ZeroDivisionError:
    found["its error"] = True
kill(next(each for each in workers() if each not in before))  # it rests
found["after one was killed"] = run(10)
done = []
def die():
    done.append("killed")
    kill(current())
dying = [executor.submit(die) for _ in range(3)]
rest = [executor.submit(done.append, i) for i in range(3)]
for future in rest:
    future.result(10)
found["behind those that were killed"] = done
slow = executor.submit(lambda: sleep(0.05) or "ended")
line = [executor.submit(sleep, 0.01) for _ in range(5)]
ends = [threading.Thread(target=executor.shutdown) for _ in range(2)]
for end in ends:
    end.start()
for end in ends:
    end.join()
found["waited for"] = slow.done() and all(each.done() for each in line)
try:
    executor.submit(sleep, 0)
except RuntimeError:
    found["refused"] = True
sleep(0.01)
found["left"] = len(workers()) - len(before)

executor = executors.load(MODEL).Executor(max_workers=1)
begun, held = executor.submit(sleep, 0.01), executor.submit(sleep, 0)
sleep(0)
executor.shutdown(cancel_futures=True)
found["cancelled"] = begun.done() and not begun.cancelled() and held.cancelled()
print(json.dumps(found))
"""


@pytest.mark.parametrize("model", ["eventlet", "gevent"])
def test_workers_are_used_again_and_end_with_their_executor(model: str) -> None:
    found = run(_WORKERS, model)
    assert found["one after the other"] == [1, 1]
    assert found["many"] == [3, 3]
    assert found["forgotten"]
    assert found["its error"]
    assert found["after one was killed"] == [3, 3]
    assert sorted(map(str, found["behind those that were killed"])) == ["0", "1", "2", *["killed"] * 3]
    assert found["waited for"]
    assert found["refused"]
    assert found["left"] == 0
    assert found["cancelled"]


_CHOSEN = """
import json, sys
import green_zmq, oslo_messaging
from oslo_config import cfg
cfg.CONF([], project="test", default_config_files=[], default_config_dirs=[])
chosen = {}
for name in [None, *sys.argv[1:]]:
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, "zmq+memory://")
    server = green_zmq.get_rpc_server(transport, oslo_messaging.Target(topic="t", server="s"), [], executor=name)
    made = server._executor_cls
    chosen[str(name)] = (server.executor_type, getattr(getattr(made, "func", made), "__module__", ""))
print(json.dumps(chosen))
"""


@pytest.mark.parametrize(
    ("patch", "name", "module"),
    [
        ("nothing", "threading", "concurrent.futures.thread"),
        ("eventlet", "eventlet", "green_zmq.executors.workers"),
        ("gevent", "gevent", "green_zmq.executors.workers"),
    ],
)
def test_our_servers_have_executors_of_ours(patch: str, name: str, module: str) -> None:
    chosen = run(PATCHES[patch] + _CHOSEN, name)
    assert chosen[name] == [name, module]
    if patch != "gevent":  # oslo.messaging does not know of it, and chooses threads, which are green ones there
        assert chosen["None"] == [name, module]


def test_threads_that_are_patched_keep_the_executor_of_oslo_messaging() -> None:
    assert run(PATCHES["eventlet"] + _CHOSEN, "threading")["threading"][1].startswith("futurist")
    assert run(PATCHES["gevent"] + _CHOSEN)["None"][1].startswith("futurist")


_TOGETHER = """
import json, sys
import eventlet; eventlet.monkey_patch()
from eventlet import hubs
from green_zmq.executors.eventlet import Event

order = []
def wait(i, event):
    event.wait()
    order.append(i)
    if i == 1:
        raise RuntimeError("one that fails takes nothing away from the others")
    if i == 2:
        more.set()
        eventlet.sleep(0)
        order.append("2 again")

hubs.get_hub().squelch_exceptions = True
events, more = [Event() for _ in range(4)], Event()
for i, event in enumerate(events):
    eventlet.spawn_n(wait, i, event)
eventlet.spawn_n(wait, "more", more)
eventlet.sleep(0)
for event in events:
    event.set()
assert order == []  # who sets goes on
with eventlet.Timeout(10):
    while len(order) < 6:
        eventlet.sleep(0.001)
print(json.dumps(order))
"""


def test_events_of_eventlet_that_happen_together_wake_everybody_in_turn() -> None:
    order = run(_TOGETHER)
    assert [each for each in order if isinstance(each, int)] == [0, 1, 2, 3]
    assert set(order) == {0, 1, 2, 3, "more", "2 again"}


_RESUMED = """
import json, sys
import eventlet; eventlet.monkey_patch()
from eventlet import hubs
from eventlet.support import greenlets
from green_zmq.executors.eventlet import Event, _Callers

hub, order, events = hubs.get_hub(), [], [Event() for _ in range(3)]
hub.squelch_exceptions = True
def wait(i, event):
    event.wait()
    order.append(i)
    if i == 1:
        raise RuntimeError("one that fails takes nothing away from the others")
def loop():
    for turn in "first", "second":
        hub.switch()
        hub.schedule_call_global(0, order.append, "a timer")
        for event in events:
            event.set()
        order.append(turn)
for i, event in enumerate(events):
    eventlet.spawn_n(wait, i, event)
owner = greenlets.greenlet(loop, hub.greenlet)
hub.schedule_call_global(0, owner.switch)
eventlet.sleep(0.001)
hub.schedule_call_global(0, _Callers.of(hub).resume, owner)
with eventlet.Timeout(10):
    while "a timer" not in order:
        eventlet.sleep(0.001)
hub.schedule_call_global(0, _Callers.of(hub).resume, owner)
with eventlet.Timeout(10):
    while "second" not in order:
        eventlet.sleep(0.001)
print(json.dumps(order))
"""


def test_whom_a_loop_of_eventlet_has_waked_goes_on_when_it_waits_and_before_any_timer() -> None:
    assert run(_RESUMED)[:6] == ["first", 0, 1, 2, "a timer", "second"]
