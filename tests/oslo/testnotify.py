# SPDX-License-Identifier: Apache-2.0
"""Oslo.messaging's own functional tests of notifications, as those of RPC beside, with NOTIFY_TRANSPORT_URL set."""

from oslo_messaging.tests.functional.notify.test_logger import LoggingNotificationHandlerTestCase, load_tests
from oslo_messaging.tests.functional.test_functional import NotifyTestCase

__all__ = ["LoggingNotificationHandlerTestCase", "NotifyTestCase", "load_tests"]
