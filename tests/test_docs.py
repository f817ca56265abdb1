# SPDX-License-Identifier: Apache-2.0
"""What is written is true: files, commands, options, URLs, error texts and numbers that the documents name."""

from __future__ import annotations

import ast
import configparser
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from docutils import nodes
from docutils.core import publish_doctree
from oslo_config import cfg, generator
from oslo_messaging.transport import TransportURL

from green_zmq import cli, config

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "etc/green_zmq.conf.sample"
RECIPE = "etc/oslo-config-generator/green_zmq.conf"
DOCUMENTS = [ROOT / "README.rst", ROOT / "CHANGELOG.rst", ROOT / "benchmarks/README.rst", *sorted((ROOT / "doc").glob("*.rst"))]
OPTIONS = {option.dest: option for option in config.OPTIONS}

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def parsed(path: Path) -> tuple[nodes.document, str]:
    """A document, and what docutils complains about in it."""
    warnings = io.StringIO()
    settings = {
        "report_level": 1,
        "halt_level": 5,
        "warning_stream": warnings,
        "syntax_highlight": "none",
        "file_insertion_enabled": False,
        "raw_enabled": False,
    }
    return publish_doctree(path.read_text(), str(path), settings_overrides=settings), warnings.getvalue()


def literals(path: Path) -> Iterator[str]:
    """What is written as code in the text."""
    for node in parsed(path)[0].findall(nodes.literal):
        yield node.astext()


def blocks(path: Path, language: str | None = None) -> Iterator[str]:
    for node in parsed(path)[0].findall(nodes.literal_block):
        if language is None or language in node["classes"]:
            yield node.astext()


def tables(root: nodes.Node) -> Iterator[list[list[str]]]:
    """Each as its rows, with the headings first."""
    for table in root.findall(nodes.table):
        yield [[" ".join(cell.astext().split()) for cell in row.findall(nodes.entry)] for row in table.findall(nodes.row)]


def section(path: Path, title: str) -> nodes.section:
    return next(node for node in parsed(path)[0].findall(nodes.section) if node[0].astext() == title)


# The documents themselves.


@documents
def test_it_can_be_parsed(path: Path) -> None:
    assert parsed(path)[1] == ""


@documents
def test_tests_that_it_names_are_there(path: Path) -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    assert {text for text in literals(path) if re.fullmatch(r"test_\w+", text)} <= there


@documents
def test_files_that_it_names_are_there(path: Path) -> None:
    for node in parsed(path)[0].findall(nodes.reference):
        target = str(node.get("refuri", "")).partition("#")[0]
        if target and "://" not in target:
            assert (path.parent / target).exists(), target
    for text in literals(path):
        if re.fullmatch(r"(doc|etc|tests|benchmarks|green_zmq)/[\w./-]*", text) and not text.endswith(".sqlite"):
            assert (ROOT / text).exists(), text


def test_readme_lists_all_of_them() -> None:
    readme = set(literals(ROOT / "README.rst")) | {
        str(node.get("refuri")) for node in parsed(ROOT / "README.rst")[0].findall(nodes.reference)
    }
    assert {f"doc/{path.name}" for path in (ROOT / "doc").glob("*.rst")} <= readme


# The command.


def commands() -> set[str]:
    parser = cli._parser()
    (subparsers,) = (action for action in parser._actions if action.dest == "command")
    assert isinstance(subparsers.choices, dict)
    return set(subparsers.choices) - {"demo-client"}


@documents
def test_commands_that_it_names_can_be_given(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks(path) for line in block.splitlines()]
    for line in [*lines, *literals(path)]:
        found = re.search(r"(?:^|\$ |&& )green-zmq (.+)", line.strip())
        if found and "COMMAND" not in line:
            # As if whoever reads it had put something where it says SOMETHING.
            words = shlex.split(found[1].replace("...", ""), comments=True)
            if len(words) == 1 and words[0] in commands():
                continue
            with contextlib.suppress(SystemExit):
                cli._parse(words)
                continue
            assert capsys.readouterr().err == "", line


def test_commands_are_documented() -> None:
    text = " ".join(literals(ROOT / "doc/commands.rst"))
    for command in commands():
        assert re.search(rf"(^| ){command}( |$)", text), command


# Options.


def test_options_are_documented_with_their_defaults() -> None:
    (rows,) = (rows for rows in tables(parsed(ROOT / "doc/configuration.rst")[0]) if rows[0][0] == "option")
    found = {row[0]: row[1] for row in rows[1:]}
    assert list(found) == list(OPTIONS)
    assert found == {name: shown(option) for name, option in OPTIONS.items()}


def shown(option: cfg.Opt) -> str:
    default = option.default
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and default >= 1 << 20:
        return f"{default >> 20} MiB"
    if isinstance(option, cfg.FloatOpt) or option.dest in ("zmq_target_expire", "zmq_target_update"):
        return f"{default:g} s"
    return str(default)


@documents
def test_settings_in_it_are_valid(path: Path) -> None:
    for block in blocks(path, "ini"):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(block)
        if parser.has_section(config.GROUP):
            for name in set(parser[config.GROUP]) - set(parser.defaults()):
                OPTIONS[name].type(parser[config.GROUP][name])


@documents
def test_urls_in_it_are_valid(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    conf = cfg.ConfigOpts()
    conf([], project="green_zmq_tests", default_config_files=[], default_config_dirs=[])
    for found in re.findall(r"\bzmq(?:\+\w+)?://[^\s`'\"()]*", path.read_text()):
        url = found.rstrip(".,;:")
        scheme, _, rest = url.partition("://")
        assert scheme in config._DIRECTORIES, url
        # Neither what only names a scheme, nor what shows the form of a URL.
        if "[" not in rest and (rest or scheme in ("zmq", "zmq+memory")):
            config.read(conf, TransportURL.parse(conf, url))
    # Oslo.messaging's, of credentials that not all hosts have.
    assert [record.message for record in caplog.records] == []


def test_template_for_nova_gives_the_url_back() -> None:
    """Expanded as Nova does it."""
    path = ROOT / "doc/deployment.rst"
    (template,) = (block for block in blocks(path) if block.startswith("{scheme}"))
    (url,) = {url for url in re.findall(r"zmq\+sentinel://\S+", path.read_text()) if url.count("@") == 3}
    scheme, _, rest = url.partition("://")
    hosts, _, group = rest.partition("/")
    values = {"scheme": scheme, "path": group, "query": "redis_prefix=cell1"}
    for i, host in enumerate(hosts.split(","), 1):
        found = re.fullmatch(r"(.*):(.*)@(.*):(.*)", host)
        assert found is not None
        values |= {f"{name}{i}": found[j] for j, name in enumerate(("username", "password", "hostname", "port"), 1)}
    assert template.format(**values) == f"{url}?redis_prefix=cell1"


def test_sample_is_current() -> None:
    conf = cfg.ConfigOpts()
    generator.register_cli_opts(conf)
    conf(["--config-file", str(ROOT / RECIPE)], project="green_zmq_tests", default_config_dirs=[])
    assert ROOT / conf.output_file == SAMPLE
    out = io.StringIO()
    generator.generate(conf, out)
    assert SAMPLE.read_text() == out.getvalue(), f"run in {ROOT}: oslo-config-generator --config-file {RECIPE}"


# The deployment guide.

GUIDE = ROOT / "doc/deployment.rst"


@cache
def texts() -> str:
    """All texts in the source, one a line, with an ellipsis for what is put into them."""
    found = []
    for path in (ROOT / "green_zmq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return "\n".join(found)


def test_error_texts_are_those_of_the_code() -> None:
    others = {"max number of clients reached"}  # Redis's
    seen = [node.astext() for node in section(GUIDE, "Troubleshooting").findall(nodes.term)]
    quoted = {text for term in seen for text in re.findall('"(.*?)"', term)}
    assert len(quoted) > 30
    for text in quoted - others:
        assert re.search(".*".join(map(re.escape, text.split("…"))), texts()), text


def test_numbers_of_descriptors_follow_from_the_formula() -> None:
    (rows,) = (rows for rows in tables(section(GUIDE, "Planning")) if rows[0][0].startswith("n nodes"))
    for row in rows[1:]:
        n, node, controller, *sums = (int(cell.replace(",", "")) for cell in row)
        assert (node, controller) == (36 + 5 * 50, 36 + 5 * (2 * n + 49))
        assert sums == [2 * node, 17 * controller]


def test_user_of_redis_is_the_one_that_is_tested() -> None:
    (user,) = (line for block in blocks(GUIDE) for line in block.splitlines() if line.startswith("user green on "))
    source = (ROOT / "tests/test_redis_directory.py").read_text()
    rules = "".join(re.findall(r'^    rules \+?= "(.*)"$', source, re.MULTILINE))
    assert user.split()[4:] == rules.replace("cloud:", "green_zmq:").split()
