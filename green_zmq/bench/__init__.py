# SPDX-License-Identifier: Apache-2.0
"""The command ``green-zmq bench``: the driver beside a bare loop and any other transport, in turn, in the same processes.

Nothing is imported here: its processes must be patched for their concurrency model first.
"""
