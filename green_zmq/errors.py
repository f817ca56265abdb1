# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, each with who erred and what to do next.

All derive from oslo.messaging's own exceptions, so that a service which handles those needs to know nothing of ours.
"""

from __future__ import annotations

from oslo_messaging import exceptions
from oslo_messaging.transport import InvalidTransportURL

__all__ = [
    "AddressError",
    "ConfigError",
    "DirectoryError",
    "InvalidTransportURL",
    "MessageTooLarge",
    "ModelError",
    "OutOfDescriptors",
    "ServerGone",
    "StoreError",
    "TransportClosed",
    "Unserializable",
    "WireError",
    "WireVersionError",
]


class ConfigError(exceptions.MessagingException):
    """An option has a value that cannot work; the text names the option."""


class ModelError(exceptions.MessagingException):
    """The concurrency model asked for cannot work in this process; the text says what to change."""


class AddressError(exceptions.MessagingException):
    """This process cannot listen where it was told to (address, port or port range)."""


class OutOfDescriptors(exceptions.MessageDeliveryFailure):
    """A transport cannot begin its work, since this process has too few descriptors left; the text says what to raise."""


class DirectoryError(exceptions.MessageDeliveryFailure):
    """The directory cannot be read or written; the text names it and says why."""


class StoreError(exceptions.MessageDeliveryFailure):
    """The store of notifications cannot be read or written; the text names it and says why."""


class MessageTooLarge(exceptions.MessagingException):
    """The message is larger than ``max_message_bytes`` and was not sent."""


class Unserializable(exceptions.MessagingException, TypeError):
    """An argument, context or result cannot be put on the wire; it was not sent."""


class TransportClosed(exceptions.MessagingException):
    """The transport was cleaned up while the operation was waiting."""


class ServerGone(exceptions.MessagingTimeout):
    """The process that had the call is gone for good, so no reply can come. It may have run the request.

    :ivar server: what was known of that process (host, port, pid).
    """

    def __init__(self, message: str, server: str) -> None:
        super().__init__(message)
        self.server = server


class WireError(exceptions.MessagingException):
    """Frames that are not of our protocol; the peer that sent them erred."""


class WireVersionError(WireError):
    """Frames of another version of the protocol than ours."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the peer speaks version {version} of the wire protocol")
        self.version = version
