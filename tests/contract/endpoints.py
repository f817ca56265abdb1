# SPDX-License-Identifier: Apache-2.0
"""What the servers of the tests do."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import Any

import oslo_messaging
from oslo_messaging import expected_exceptions, expose

from tests.contract import models


class Complaint(Exception):
    """An exception of an application."""


class Detailed(Complaint):
    def __init__(self, text: str, detail: str = "") -> None:
        super().__init__(text)
        self.detail = detail


class Endpoint:
    """``seen`` holds what it was given, in order; ``released`` lets the handlers go that were told to hold."""

    def __init__(self, label: str, relay: Any) -> None:
        self.label = label
        self.seen: list[Any] = []
        self.began: list[Any] = []
        self.released = False
        self._relay = relay

    def echo(self, ctxt: Any, value: Any = None) -> Any:
        return value

    def context(self, ctxt: Any) -> Any:
        return ctxt

    @expose
    def who(self, ctxt: Any) -> str:
        return self.label

    def pid(self, ctxt: Any) -> int:
        return os.getpid()

    def note(self, ctxt: Any, value: Any) -> Any:
        self.seen.append(value)
        return value

    def hold(self, ctxt: Any, value: Any = None) -> Any:
        self.began.append(value)
        models.wait_until(lambda: self.released, 60)
        self.seen.append(value)
        return value

    def rest(self, ctxt: Any, seconds: float, value: Any = None) -> Any:
        self.began.append(value)
        models.sleep(seconds)
        self.seen.append(value)
        return seconds if value is None else value

    def fill(self, ctxt: Any, size: int) -> str:
        return "x" * size

    def digest(self, ctxt: Any, value: str) -> list[Any]:
        return [len(value), hashlib.sha256(value.encode()).hexdigest()]

    def unserialisable(self, ctxt: Any) -> Any:
        return threading.Lock()

    def fail(self, ctxt: Any, name: str, text: str) -> None:
        raise {"ValueError": ValueError, "Complaint": Complaint, "KeyError": KeyError}[name](text)

    def fail_with_detail(self, ctxt: Any) -> None:
        raise Detailed("it is so", detail="because")

    @expected_exceptions(ValueError)
    def fail_as_expected(self, ctxt: Any, text: str) -> None:
        raise ValueError(text)

    def relay(self, ctxt: Any, how: dict[str, Any]) -> Any:
        """Call somebody else while the caller waits."""
        return self._relay(**how)

    def _secret(self, ctxt: Any) -> str:
        return "secret"


class Versioned:
    """The same method in a namespace and version of its own."""

    def __init__(self, namespace: str | None, version: str) -> None:
        self.target = oslo_messaging.Target(namespace=namespace, version=version)

    def where(self, ctxt: Any) -> str:
        return f"{self.target.namespace} {self.target.version}"


class Wrapping(oslo_messaging.Serializer):
    """Shows where it was applied."""

    def serialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return {"wrapped": entity}

    def deserialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return entity["wrapped"]

    def serialize_context(self, ctxt: Any) -> Any:
        return {"outer": ctxt}

    def deserialize_context(self, ctxt: Any) -> Any:
        return {**ctxt["outer"], "passed": True}


class ContextObject:
    """A context as oslo.context has it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def to_dict(self) -> dict[str, Any]:
        return self._values
