# SPDX-License-Identifier: Apache-2.0
"""``python -m green_zmq.cli`` is ``green-zmq``."""

from __future__ import annotations

import sys

from green_zmq.cli import main

sys.exit(main())
