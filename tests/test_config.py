# SPDX-License-Identifier: Apache-2.0
"""Options and the transport URL."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from oslo_config import cfg, generator
from oslo_messaging.transport import TransportURL

from green_zmq import config, wire
from green_zmq.config import GROUP, Settings
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


def test_defaults() -> None:
    settings = read("zmq://")
    assert settings.model == "threads"
    assert settings.directory == "sqlite"
    assert settings.host == settings.bind_address == "127.0.0.1"
    assert 1 <= settings.min_port < settings.max_port <= 65536
    assert settings.expire >= 2 * settings.update
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
]


@pytest.mark.parametrize(("name", "text", "field", "value"), OVERRIDES)
def test_query_goes_before_option(name: str, text: str, field: str, value: object) -> None:
    assert getattr(read(f"zmq://?{name}={text}"), field) == value
    default = getattr(read("zmq://"), field)
    option = next(o for o in config.OPTIONS if o.dest == name)
    assert getattr(read("zmq://", **{name: option.type(text)}), field) == value
    assert default != value, "or the test shows nothing"


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("cast_grace", "0.25", "grace", 0.25),
        ("message_ttl", "20", "time_to_live", 20.0),
        ("outbox_messages", "3", "outbox_messages", 3),
        ("outbox_bytes", "4096", "outbox_bytes", 4096),
        ("max_message_bytes", "2048", "message_bytes", 2048),
    ],
)
def test_limits(name: str, text: str, field: str, value: object) -> None:
    assert getattr(read(f"zmq://?{name}={text}").limits, field) == value


@pytest.mark.parametrize("name", ["threads", "threading"])
def test_threads_go_by_two_names(name: str) -> None:
    assert read(f"zmq://?executor={name}").model == "threads"


def test_several_in_one_query() -> None:
    settings = read("zmq://?zmq_linger=1&cast_grace=2&executor=eventlet", zmq_linger=9.0)
    assert (settings.linger, settings.limits.grace, settings.model) == (1.0, 2.0, "eventlet")


def test_every_option_can_be_in_the_query() -> None:
    tried = {name for name, *_ in OVERRIDES} | {
        "cast_grace",
        "message_ttl",
        "outbox_messages",
        "outbox_bytes",
        "max_message_bytes",
    }
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
@pytest.mark.parametrize("name", ["zmq_linger", "cast_grace", "message_ttl", "connection_idle_timeout", "heartbeat_interval"])
def test_times_are_finite(name: str, text: str) -> None:
    """A time that compares with nothing, or cannot be made milliseconds, would fail in the loop, long after the start."""
    with pytest.raises((InvalidTransportURL, ConfigError), match=name):
        read(f"zmq://?{name}={text}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rpc_zmq_min_port": 6000, "rpc_zmq_max_port": 6000}, ["rpc_zmq_min_port (6000)", "rpc_zmq_max_port (6000)", "above"]),
        ({"rpc_zmq_min_port": 6000, "rpc_zmq_max_port": 5000}, ["above"]),
        ({"zmq_target_expire": 10, "zmq_target_update": 6}, ["zmq_target_expire (10)", "zmq_target_update (6)", "twice"]),
        ({"zmq_target_update": 31}, ["zmq_target_update (31)"]),
        ({"message_ttl": 0.0}, ["message_ttl"]),
        ({"message_ttl": 1.0, "cast_grace": 5.0}, ["message_ttl", "cast_grace"]),
    ],
)
def test_options_that_do_not_fit_each_other(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read("zmq://", **options)
    for word in words:
        assert word in str(caught.value)


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


@pytest.mark.parametrize("fail", [lambda: read("zmq://host"), lambda: read("zmq://?colour=red")])
def test_errors_are_sentences(fail: Callable[[], object]) -> None:
    with pytest.raises(InvalidTransportURL) as caught:
        fail()
    assert ends_in_period(str(caught.value))
