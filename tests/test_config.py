# SPDX-License-Identifier: Apache-2.0
"""Options and the transport URL."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus, urlencode

import pytest
from oslo_config import cfg, generator
from oslo_messaging.transport import TransportURL

from green_zmq import config, wire
from green_zmq.config import GROUP, Redis, Settings
from green_zmq.errors import ConfigError, InvalidTransportURL


def configuration(**options: object) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], project="green_zmq_tests", default_config_files=[], default_config_dirs=[])
    conf.register_opts(config.OPTIONS, group=GROUP)
    for name, value in options.items():
        conf.set_override(name, value, group=GROUP)
    return conf


def read(url: str, **options: object) -> Settings:
    conf = configuration(**options)
    return config.read(conf, TransportURL.parse(conf, url))


def redis(url: str, **options: object) -> Redis:
    found = read(url, **options).redis
    assert found is not None
    return found


def test_defaults() -> None:
    settings = read("zmq://")
    assert settings.model == "threads"
    assert settings.directory == "sqlite"
    assert settings.host == settings.bind_address == "127.0.0.1"
    assert 1 <= settings.min_port < settings.max_port <= 65536
    assert (settings.update, settings.expire) == (25, 75)
    assert settings.redis is None
    assert settings.codec == wire.JSON
    assert (settings.limits.grace, settings.limits.time_to_live) == (1.0, 300.0)
    assert settings.linger > 0
    assert settings.directory_path.name == "directory.sqlite"
    assert settings.directory_path.is_absolute()


@pytest.mark.parametrize("url", ["zmq:///", "zmq:////"])
def test_slashes_mean_nothing(url: str) -> None:
    assert read(url) == read("zmq://")


def test_url_that_was_written_out_means_the_same() -> None:
    conf = configuration()
    url = TransportURL.parse(conf, "zmq://?cast_grace=2.5&directory_path=/x/y")
    again = TransportURL.parse(conf, str(url))
    assert config.read(conf, again) == config.read(conf, url)


def test_memory() -> None:
    assert read("zmq+memory://").directory == "memory"
    assert read("zmq+memory:///").directory == "memory"


def test_notifications_are_beside_the_directory_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("zmq://?directory_path=/some/where").notification_path == Path("/some/notifications.sqlite")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert read("zmq://").notification_path == Path("/state/green_zmq/notifications.sqlite")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert read("zmq://").notification_path == Path("/home/me/.local/state/green_zmq/notifications.sqlite")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        read("zmq://").linger = 1  # type: ignore[misc]


OVERRIDES = [
    ("executor", "gevent", "model", "gevent"),
    ("rpc_zmq_host", "10.1.2.3", "host", "10.1.2.3"),
    ("rpc_zmq_bind_address", "eth0", "bind_address", "eth0"),
    ("rpc_zmq_min_port", "50000", "min_port", 50000),
    ("rpc_zmq_max_port", "60000", "max_port", 60000),
    ("zmq_target_expire", "90", "expire", 90),
    ("zmq_target_update", "5", "update", 5),
    ("rpc_zmq_serialization", "msgpack", "codec", wire.MSGPACK),
    ("zmq_linger", "0", "linger", 0.0),
    ("zmq_linger", "1.5", "linger", 1.5),
    ("directory_path", "/some/where", "directory_path", Path("/some/where")),
    ("listener_window", "7", "listener_window", 7),
    ("max_connections", "9", "max_connections", 9),
    ("connection_idle_timeout", "30", "idle_timeout", 30.0),
    ("heartbeat_interval", "2.5", "heartbeat", 2.5),
    ("gc_threshold", "0", "gc_threshold", 0),
    ("notification_path", "/some/where", "notification_path", Path("/some/where")),
]


@pytest.mark.parametrize(("name", "text", "field", "value"), OVERRIDES)
def test_query_goes_before_option(name: str, text: str, field: str, value: object) -> None:
    assert getattr(read(f"zmq://?{name}={text}"), field) == value
    default = getattr(read("zmq://"), field)
    option = next(o for o in config.OPTIONS if o.dest == name)
    assert getattr(read("zmq://", **{name: option.type(text)}), field) == value
    assert default != value, "or the test shows nothing"


NESTED = [
    ("cast_grace", "0.25", "limits", "grace", 0.25),
    ("message_ttl", "20", "limits", "time_to_live", 20.0),
    ("outbox_messages", "3", "limits", "outbox_messages", 3),
    ("outbox_bytes", "4096", "limits", "outbox_bytes", 4096),
    ("max_message_bytes", "2048", "limits", "message_bytes", 2048),
    ("notification_messages", "5", "bounds", "messages", 5),
    ("notification_age", "60.5", "bounds", "age", 60.5),
    ("notification_takeover", "2", "bounds", "takeover", 2.0),
    ("notification_tries", "3", "bounds", "tries", 3),
]


@pytest.mark.parametrize(("name", "text", "group", "field", "value"), NESTED)
def test_limits(name: str, text: str, group: str, field: str, value: object) -> None:
    assert getattr(getattr(read(f"zmq://?{name}={text}"), group), field) == value
    assert getattr(getattr(read("zmq://"), group), field) != value, "or the test shows nothing"


@pytest.mark.parametrize("name", ["threads", "threading"])
def test_threads_go_by_two_names(name: str) -> None:
    assert read(f"zmq://?executor={name}").model == "threads"


# Those that say how Redis is reached.
REDIS_OVERRIDES = [
    ("redis_prefix", "cloud7", "prefix", "cloud7"),
    ("redis_prefix", "a:b c*", "prefix", "a:b c*"),
    ("redis_timeout", "0.5", "timeout", 0.5),
    ("redis_tls", "true", "tls", True),
    ("redis_ca_file", "/etc/ssl/ca.pem", "ca_file", "/etc/ssl/ca.pem"),
    ("redis_cert_file", "/etc/ssl/cert.pem", "cert_file", "/etc/ssl/cert.pem"),
    ("redis_key_file", "/etc/ssl/key.pem", "key_file", "/etc/ssl/key.pem"),
    ("redis_sentinel_username", "watcher", "sentinel_user", "watcher"),
    ("redis_sentinel_password", "p@ss/w:rd&", "sentinel_password", "p@ss/w:rd&"),
]


@pytest.mark.parametrize("url", ["zmq+redis://host/0", "zmq+sentinel://host/group"])
@pytest.mark.parametrize(("name", "text", "field", "value"), REDIS_OVERRIDES)
def test_options_of_redis_from_query_and_file(
    url: str, name: str, text: str, field: str, value: object, tmp_path: Path
) -> None:
    def with_file(lines: str, url: str) -> object:
        file = tmp_path / "service.conf"
        file.write_text(f"[{GROUP}]\n{lines}\n")
        conf = cfg.ConfigOpts()
        conf(["--config-file", str(file)], project="green_zmq_tests")
        return getattr(config.read(conf, TransportURL.parse(conf, url)).redis, field)

    in_query = f"{url}?{urlencode({name: text})}"
    other = "9" if name == "redis_timeout" else "no"
    tls = "redis_tls = yes\n" if name.endswith("_file") else ""
    assert getattr(redis(url), field) != value, "or the test shows nothing"
    assert with_file(f"{tls}{name} = {text}", url) == value
    assert with_file(tls, in_query) == value
    assert with_file(f"{tls}{name} = {other}", in_query) == value


def test_several_in_one_query() -> None:
    settings = read("zmq://?zmq_linger=1&cast_grace=2&executor=eventlet", zmq_linger=9.0)
    assert (settings.linger, settings.limits.grace, settings.model) == (1.0, 2.0, "eventlet")


def test_every_option_can_be_in_the_query() -> None:
    tried = {name for name, *_ in (*OVERRIDES, *REDIS_OVERRIDES, *NESTED)}
    assert {option.dest for option in config.OPTIONS} == tried


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_loopback_host_is_listened_on_alone(host: str) -> None:
    assert read("zmq://", rpc_zmq_host=host).bind_address == host


@pytest.mark.parametrize("host", ["10.0.0.1", "node-7.example.org", "2001:db8::1"])
def test_other_host_is_listened_on_everywhere(host: str) -> None:
    assert read("zmq://", rpc_zmq_host=host).bind_address == "*"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("zmq://somewhere", ["no host", "directory_path"]),
        ("zmq://somewhere:1234", ["no host"]),
        ("zmq://user:secret@somewhere/", ["no host"]),
        ("zmq://one,two/", ["no host"]),
        ("zmq:///path", ["no path", "directory_path"]),
        ("zmq:///a/b", ["no path"]),
        ("zmq+memory://somewhere", ["zmq+memory://", "no host"]),
        ("rabbit://", ["'rabbit://'", "zmq://", "zmq+memory://"]),
        ("zmq+carrier-pigeon://", ["zmq+carrier-pigeon", "zmq://"]),
        ("zmq://?colour=red", ["'colour'", "zmq_linger", "executor"]),
        ("zmq://?ZMQ_LINGER=1", ["'ZMQ_LINGER'"]),
        ("zmq://?zmq_linger=soon", ["zmq_linger=soon"]),
        ("zmq://?zmq_linger=-1", ["zmq_linger=-1", "0"]),
        ("zmq://?rpc_zmq_min_port=0", ["rpc_zmq_min_port=0"]),
        ("zmq://?rpc_zmq_min_port=70000", ["rpc_zmq_min_port=70000"]),
        ("zmq://?rpc_zmq_max_port=65537", ["rpc_zmq_max_port=65537", "65536"]),
        ("zmq://?zmq_target_expire=2", ["zmq_target_expire=2"]),
        ("zmq://?rpc_zmq_serialization=xml", ["rpc_zmq_serialization=xml", "json", "msgpack"]),
        ("zmq://?executor=fibers", ["executor=fibers", "eventlet", "gevent", "threads"]),
        ("zmq://?outbox_messages=0", ["outbox_messages=0"]),
        ("zmq://?listener_window=many", ["listener_window=many"]),
        ("zmq://?max_message_bytes=1", ["max_message_bytes=1"]),
        ("zmq://?heartbeat_interval=0", ["heartbeat_interval=0"]),
    ],
)
def test_bad_url_is_named(url: str, words: list[str]) -> None:
    with pytest.raises(InvalidTransportURL) as caught:
        read(url)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("url", ["zmq://user:secret@somewhere/", "zmq://user:secret@somewhere/?colour=red"])
def test_errors_do_not_tell_passwords(url: str) -> None:
    with pytest.raises(InvalidTransportURL) as caught:
        read(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name",
    [
        "zmq_linger",
        "cast_grace",
        "message_ttl",
        "connection_idle_timeout",
        "heartbeat_interval",
        "redis_timeout",
        "notification_age",
        "notification_takeover",
    ],
)
def test_times_are_finite(name: str, text: str) -> None:
    """A time that compares with nothing, or cannot be made milliseconds, would fail in the loop, long after the start."""
    with pytest.raises((InvalidTransportURL, ConfigError), match=name):
        read(f"zmq://?{name}={text}")


def test_the_finite_times_are_all() -> None:
    mark = next(mark for mark in test_times_are_finite.pytestmark if mark.args[0] == "name")  # type: ignore[attr-defined]
    assert {option.dest for option in config.OPTIONS if isinstance(option, cfg.FloatOpt)} == set(mark.args[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rpc_zmq_min_port": 6000, "rpc_zmq_max_port": 6000}, ["rpc_zmq_min_port (6000)", "rpc_zmq_max_port (6000)", "above"]),
        ({"rpc_zmq_min_port": 6000, "rpc_zmq_max_port": 5000}, ["above"]),
        ({"zmq_target_expire": 10, "zmq_target_update": 6}, ["zmq_target_expire (10)", "zmq_target_update (6)", "twice"]),
        ({"zmq_target_update": 38}, ["zmq_target_expire (75)", "zmq_target_update (38)"]),
        ({"zmq_target_expire": 49}, ["zmq_target_expire (49)", "zmq_target_update (25)"]),
        ({"message_ttl": 0.0}, ["message_ttl"]),
        ({"message_ttl": 1.0, "cast_grace": 5.0}, ["message_ttl", "cast_grace"]),
    ],
)
def test_options_that_do_not_fit_each_other(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read("zmq://", **options)
    for word in words:
        assert word in str(caught.value)


# Redis.


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("one", [("one", None)]),
        ("one:7000", [("one", 7000)]),
        ("one,two:7001,three", [("one", None), ("two", 7001), ("three", None)]),
        ("10.0.0.1:7000", [("10.0.0.1", 7000)]),
        ("[::1]", [("::1", None)]),
        ("[2001:db8::1]:7000,[::1],one:65535", [("2001:db8::1", 7000), ("::1", None), ("one", 65535)]),
        ("redis-1.example.org,redis_2", [("redis-1.example.org", None), ("redis_2", None)]),
    ],
)
@pytest.mark.parametrize(("scheme", "path", "port"), [("zmq+redis", "", 6379), ("zmq+sentinel", "/group", 26379)])
def test_hosts(scheme: str, path: str, port: int, hosts: str, expected: list[tuple[str, int | None]]) -> None:
    found = tuple((host, number or port) for host, number in expected)
    assert redis(f"{scheme}://{hosts}{path}").hosts == found
    # In messages they are as in the URL.
    shown = ",".join(f"[{host}]:{number}" if ":" in host else f"{host}:{number}" for host, number in found)
    assert shown in str(redis(f"{scheme}://{hosts}{path}"))


@pytest.mark.parametrize(
    ("before", "user", "password"),
    [
        ("", None, None),
        ("nova:secret@", "nova", "secret"),
        (":secret@", None, "secret"),
        ("nova:@", "nova", ""),
        ("n%40va:s%3Ae%2Fc%40r%25e%2Ct%20%23%3F@", "n@va", "s:e/c@r%e,t #?"),
        ("nova:s+e&c=r$e-t_.!*()@", "nova", "s+e&c=r$e-t_.!*()"),
        (f"nova:{quote('größe-世界')}@", "nova", "größe-世界"),
        ("nova:se:cr:et@", "nova", "se:cr:et"),
    ],
)
@pytest.mark.parametrize(
    "form",
    ["zmq+redis://{}host/1", "zmq+redis://{0}[::1]:7000,{0}[::2]", "zmq+redis://{}one,two", "zmq+sentinel://{}host/group"],
)
def test_credentials(form: str, before: str, user: str | None, password: str | None) -> None:
    """Of all hosts, also if only some have any."""
    found = redis(form.format(before))
    assert (found.user, found.password) == (user, password)
    assert (found.sentinel_user, found.sentinel_password) == (None, None)


@pytest.mark.parametrize(
    ("path", "database"), [("", 0), ("/", 0), ("/0", 0), ("/1", 1), ("/15", 15), ("/15/", 15), ("/%37", 7), ("/00002", 2)]
)
def test_database(path: str, database: int) -> None:
    assert redis(f"zmq+redis://host{path}").database == database
    assert redis(f"zmq+redis://host{path}").group == ""


@pytest.mark.parametrize(
    ("path", "group", "database"),
    [
        ("/group", "group", 0),
        ("/group/", "group", 0),
        ("/group/3", "group", 3),
        ("/my%20group/3", "my group", 3),
        ("/0", "0", 0),
        ("/0/1", "0", 1),
        ("/a.b-c_d:e", "a.b-c_d:e", 0),
    ],
)
def test_group(path: str, group: str, database: int) -> None:
    found = redis(f"zmq+sentinel://host{path}")
    assert (found.group, found.database) == (group, database)
    assert group in str(found)


def test_redis_defaults() -> None:
    settings = read("zmq+redis://host")
    assert settings.directory == "redis"
    assert settings.redis == Redis(
        hosts=(("host", 6379),),
        group="",
        database=0,
        user=None,
        password=None,
        sentinel_user=None,
        sentinel_password=None,
        prefix="green_zmq",
        timeout=2.0,
        tls=False,
        ca_file=None,
        cert_file=None,
        key_file=None,
    )
    assert read("zmq+sentinel://host/group").directory == "redis"


def test_options_of_redis_mean_nothing_without_it() -> None:
    assert read("zmq://?redis_prefix=other&redis_ca_file=/x").redis is None
    assert read("zmq+memory://", redis_prefix="").redis is None


@pytest.mark.parametrize(
    "url",
    [
        "zmq+redis://nova:s%40cret@two,nova:s%40cret@[::1]:7000/3?redis_tls=true&redis_prefix=a%26b",
        "zmq+sentinel://:p%2Fw@one,two:7/my%20group/2?redis_sentinel_password=x%26y%3D",
    ],
)
def test_url_with_redis_that_was_written_out_means_the_same(url: str) -> None:
    conf = configuration()
    first = TransportURL.parse(conf, url)
    assert config.read(conf, TransportURL.parse(conf, str(first))) == config.read(conf, first)


@pytest.mark.parametrize("url", ["zmq+redis://host", "zmq+redis://127.0.0.1", "zmq+sentinel://localhost/group"])
@pytest.mark.parametrize(
    ("query", "host", "bind_address"),
    [
        ("", "", "*"),  # others are on other hosts, so it is the name of this one
        ("?rpc_zmq_host=10.0.0.1", "10.0.0.1", "*"),
        ("?rpc_zmq_host=node-7.example.org", "node-7.example.org", "*"),
        ("?rpc_zmq_host=127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("?rpc_zmq_bind_address=eth0", "", "eth0"),
        ("?rpc_zmq_bind_address=10.0.0.1&rpc_zmq_host=outside", "outside", "10.0.0.1"),
        ("?rpc_zmq_bind_address=*", "", "*"),
    ],
)
def test_host_over_redis(url: str, query: str, host: str, bind_address: str) -> None:
    settings = read(url + query)
    assert (settings.host, settings.bind_address) == (host, bind_address)


REDIS_FORM = "zmq+redis://[USER:PASSWORD@]HOST[:PORT][,HOST...][/DB]"
SENTINEL_FORM = "zmq+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST...]/GROUP[/DB]"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("zmq+redis://", ["no host", REDIS_FORM]),
        ("zmq+redis:///0", ["no host", REDIS_FORM]),
        ("zmq+redis://,", ["no host"]),
        ("zmq+redis://:7000", ["host has no name", REDIS_FORM]),
        ("zmq+redis://one,:7000/0", ["host has no name"]),
        ("zmq+redis://nova:secret@/0", ["host has no name"]),
        ("zmq+redis://host/x", ["database", REDIS_FORM]),
        ("zmq+redis://host/-1", ["database"]),
        ("zmq+redis://host/1.5", ["database"]),
        ("zmq+redis://host/1/2", ["database"]),
        ("zmq+redis://host/123456", ["database"]),
        ("zmq+redis://host/%D9%A3", ["database"]),  # a digit, but none of ours
        ("zmq+redis://host/group", ["database"]),
        ("zmq+redis://nova@host", ["no password", REDIS_FORM]),
        ("zmq+redis://nova:a@one,nova:b@two", ["different", REDIS_FORM]),
        ("zmq+redis://nova:a@one,cinder:a@two", ["different"]),
        ("zmq+redis://:a@one,nova:a@two", ["different"]),
        ("zmq+sentinel://", ["no host", SENTINEL_FORM]),
        ("zmq+sentinel:///group", ["no host"]),
        ("zmq+sentinel://host", ["no group", SENTINEL_FORM]),
        ("zmq+sentinel://host/", ["no group"]),
        ("zmq+sentinel://host//1", ["no group"]),
        ("zmq+sentinel://host/group/x", ["database", SENTINEL_FORM]),
        ("zmq+sentinel://host/group/1/2", ["database"]),
        ("zmq+redis://host?colour=red", ["'colour'", "redis_prefix", "redis_tls"]),
        ("zmq+redis://host?redis_timeout=0", ["redis_timeout=0", "0.1"]),
        ("zmq+redis://host?redis_timeout=soon", ["redis_timeout=soon"]),
        ("zmq+redis://host?redis_tls=maybe", ["redis_tls=maybe"]),
    ],
)
def test_bad_redis_url_is_named(url: str, words: list[str]) -> None:
    with pytest.raises(InvalidTransportURL) as caught:
        read(url)
    for word in words:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("port", ["-1", "65536", "99999", "0"])
@pytest.mark.parametrize("form", ["zmq+redis://host:{}/0", "zmq+redis://u:p@one,u:p@[::1]:{}", "zmq+sentinel://host:{}/group"])
def test_bad_port_is_named(form: str, port: str) -> None:
    with pytest.raises(InvalidTransportURL, match="port"):
        read(form.format(port))


def test_a_port_that_is_no_number() -> None:
    """It is oslo.messaging that says so."""
    with pytest.raises(ValueError, match="port-x") as caught:
        read("zmq+redis://nova:secret@host:port-x/0")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["zmq+redis://host", "zmq+sentinel://host/group"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"redis_prefix": ""}, ["redis_prefix", "empty"]),
        ({"redis_ca_file": "/x"}, ["redis_ca_file", "redis_tls"]),
        ({"redis_cert_file": "/x", "redis_key_file": "/y"}, ["redis_cert_file", "redis_tls"]),
        ({"redis_key_file": "/x", "redis_tls": False}, ["redis_key_file", "redis_tls"]),
    ],
)
def test_options_of_redis_that_do_not_fit_each_other(url: str, options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(url, **options)
    for word in words:
        assert word in str(caught.value)
    assert ends_in_period(str(caught.value))


def test_redis_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"green_zmq\[redis\]"):
        read("zmq+redis://host")
    assert read("zmq://").directory == "sqlite"


@pytest.mark.parametrize(
    "url",
    [
        "zmq+redis://nova:{}@host?colour=red",
        "zmq+redis://nova:{}@host?redis_timeout=soon",
        "zmq+redis://:{}@host/x",
        "zmq+redis://nova:{}@",
        "zmq+redis://nova:{}@one,nova:other@two",
        "zmq+redis://nova:other@one,nova:{}@two/x",
        "zmq+sentinel://nova:{}@host",
        "zmq+sentinel://host?redis_sentinel_password={}",
        "zmq+sentinel://host/group/x?redis_sentinel_password={}",
        "zmq+sentinel://host/group?redis_sentinel_password={}&colour=red",
        "zmq+sentinel://nova:{0}@host/group?redis_sentinel_password={0}&redis_tls=maybe",
        "zmq+carrier-pigeon://nova:{}@host",
        "zmq://nova:{}@host",
    ],
)
@pytest.mark.parametrize("password", ["secret", "sec ret", "s@e/c:r+e&t=", "sécrét"])
def test_no_part_of_an_error_tells_a_password(url: str, password: str) -> None:
    """Also not what it carries: the URL, which whoever handles it may log."""
    quoted = quote(password, "")
    with pytest.raises(InvalidTransportURL) as caught:
        read(url.format(quoted))
    text = f"{caught.value} {caught.value!r} {caught.value.__dict__}"
    assert not [each for each in (password, quoted, quote_plus(password)) if each in text]


@pytest.mark.parametrize(
    "options",
    [{"redis_ca_file": "/x"}, {"redis_prefix": ""}, {"zmq_target_update": 38}, {"message_ttl": 0.0}],
)
def test_errors_of_options_tell_no_password(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        read("zmq+sentinel://nova:secret@host/group?redis_sentinel_password=secret", **options)
    assert "secret" not in f"{caught.value} {caught.value!r}"


def test_settings_do_not_tell_passwords() -> None:
    settings = read("zmq+sentinel://nova:secret@host/group", redis_sentinel_password="secret")
    assert settings.redis is not None
    assert settings.redis.password == settings.redis.sentinel_password == "secret"
    assert "secret" not in f"{settings!r} {settings} {settings.redis!r} {settings.redis}"


def test_secret_options_are_not_logged() -> None:
    """oslo.config masks them when a service logs its options."""
    assert [option.dest for option in config.OPTIONS if option.secret] == ["redis_sentinel_password"]


def test_query_and_options_must_fit_together() -> None:
    with pytest.raises(ConfigError, match="rpc_zmq_max_port"):
        read("zmq://?rpc_zmq_max_port=50000", rpc_zmq_min_port=50001)


def test_one_port_is_a_range() -> None:
    settings = read("zmq://?rpc_zmq_min_port=6000&rpc_zmq_max_port=6001")
    assert range(settings.min_port, settings.max_port) == range(6000, 6001)


def test_bad_option_in_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "service.conf"
    file.write_text(f"[{GROUP}]\nzmq_linger = soon\n")
    conf = cfg.ConfigOpts()
    conf(["--config-file", str(file)], project="green_zmq_tests")
    with pytest.raises(ValueError, match="zmq_linger"):
        config.read(conf, TransportURL.parse(conf, "zmq://"))


def test_options_in_a_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "service.conf"
    file.write_text(f"[{GROUP}]\nzmq_linger = 2.5\nrpc_zmq_host = here\ndirectory_path = {tmp_path}/d\n")
    conf = cfg.ConfigOpts()
    conf(["--config-file", str(file)], project="green_zmq_tests")
    settings = config.read(conf, TransportURL.parse(conf, "zmq://"))
    assert (settings.linger, settings.host, settings.directory_path) == (2.5, "here", tmp_path / "d")


def test_reading_twice_with_one_configuration() -> None:
    conf = configuration()
    url = TransportURL.parse(conf, "zmq://")
    assert config.read(conf, url) == config.read(conf, url)


def test_directory_in_the_runtime_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert read("zmq://").directory_path == tmp_path / "green_zmq" / "directory.sqlite"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "there is none"))
    path = read("zmq://").directory_path
    assert tmp_path not in path.parents
    assert path.parent.name.startswith("green_zmq")


def generate() -> str:
    conf = cfg.ConfigOpts()
    generator.register_cli_opts(conf)
    conf(["--namespace", "green_zmq"], project="green_zmq_tests", default_config_files=[], default_config_dirs=[])
    out = io.StringIO()
    generator.generate(conf, out)
    return out.getvalue()


def test_generator_knows_the_options() -> None:
    text = generate()
    assert f"[{GROUP}]" in text
    for option in config.OPTIONS:
        assert f"#{option.dest} = " in text, option.dest


@pytest.mark.parametrize("option", config.OPTIONS, ids=lambda option: option.dest)
def test_every_option_says_what_it_is(option: cfg.Opt) -> None:
    assert option.help
    assert len(option.help) > 20
    assert option.help.endswith(".")


def ends_in_period(text: str) -> bool:
    return text.rstrip().endswith(".")


@pytest.mark.parametrize("fail", [lambda: read("zmq://host"), lambda: read("zmq://?colour=red"), lambda: read("zmq+redis://")])
def test_errors_are_sentences(fail: Callable[[], object]) -> None:
    with pytest.raises(InvalidTransportURL) as caught:
        fail()
    assert ends_in_period(str(caught.value))
