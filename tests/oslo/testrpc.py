# SPDX-License-Identifier: Apache-2.0
"""Oslo.messaging's own functional tests of RPC, run by stestr: see __main__.py.

They come with its package, which patches the process with eventlet when it is imported. Not for pytest: the name of this
file keeps it away.
"""

from oslo_messaging.tests.functional.test_functional import CallTestCase, CastTestCase, MetricsTestCase

__all__ = ["CallTestCase", "CastTestCase", "MetricsTestCase"]
