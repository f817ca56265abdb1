# SPDX-License-Identifier: Apache-2.0
"""Run simulated worlds: ``python -m tests.simulation --seeds 10000``, or one of them with everything that happens in it."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import warnings

from rich.progress import track

from tests.simulation.mutations import MUTATIONS, plant


def replay(seed: int) -> None:
    from tests.simulation.world import World

    world = World(seed)
    try:
        world.run()
    finally:
        print("\n".join(world.clock.notes))
    print(f"seed {seed}: {len(world.promises.messages)} messages, every promise kept, digest {world.clock.digest:08x}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many worlds")
    parser.add_argument("--first", type=int, help="the first seed; any, if not given")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--seed", type=int, help="only this one, with everything that happens in it")
    parser.add_argument("--mutation", choices=MUTATIONS, metavar="NAME", help="with this defect planted")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.mutation:
        plant(options.mutation)
    if options.seed is not None:
        replay(options.seed)
        return
    from tests.simulation.world import World

    first = secrets.randbelow(1 << 31) if options.first is None else options.first
    began, messages, worlds = time.monotonic(), 0, 0
    for seed in track(range(first, first + options.seeds), "worlds", disable=not sys.stderr.isatty()):
        if time.monotonic() - began > options.seconds:
            break
        world = World(seed)
        try:
            world.run()
        except Exception as error:
            sys.exit(f"seed {seed}, world {worlds + 1}: {type(error).__name__}: {error}")
        worlds += 1
        messages += len(world.promises.messages)
    print(f"{worlds} worlds from seed {first} on, {messages} messages: every promise kept, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
