"""`make model`: every world, the large ones too; how many states each has; what goes wrong without each guard."""

import sys
import time

from .prefix import PREFIX_MISSED, PREFIX_WORLDS, visit_prefix
from .prefix_world import PREFIX_GUARDS
from .world import GUARDS
from .worlds import LARGE_WORLDS, MISSED, WORLDS, say, visit


def main() -> int:
    total = 0
    every = [(world, visit) for world in (*WORLDS, *LARGE_WORLDS)]
    every += [(world, visit_prefix) for world in PREFIX_WORLDS]
    for world, visited in every:
        began_s = time.monotonic()
        explored = visited(world)
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
    for world, _ in PREFIX_MISSED:
        guards = "; ".join(PREFIX_GUARDS[guard] for guard in world.without)
        say(f"\nON THE WAY BACK, {world.name.upper()}: {guards}\n{visit_prefix(world).wrong}")
    return 0


sys.exit(main())
