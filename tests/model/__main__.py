"""`make model`: every world, the large ones too; how many states each has; what goes wrong without each guard."""

import sys
import time

from .world import GUARDS
from .worlds import LARGE_WORLDS, MISSED, WORLDS, say, visit


def main() -> int:
    total = 0
    for world in (*WORLDS, *LARGE_WORLDS):
        began_s = time.monotonic()
        explored = visit(world)
        total += explored.num_states
        seconds = time.monotonic() - began_s
        say(
            f"{explored.num_states:9,} states, {explored.num_steps:9,} steps, {seconds:5.0f} s: {world.name}",
        )
        if explored.wrong:
            say(explored.wrong)
            return 1
    say(f"{total:9,} states, and nothing goes wrong in any")
    for world, _ in MISSED:
        say(f"\n{world.name.upper()}: {GUARDS[world.without]}\n{visit(world).wrong}")
    return 0


sys.exit(main())
