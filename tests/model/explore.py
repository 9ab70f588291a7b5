"""Visits every state that a system can be in, breadth first, and says how it came to the first that is wrong."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Step = tuple[str, object]
"""What happens, in words, and the state after it."""


class Wrong(Exception):
    """What must never happen did; raised by whoever makes a step, or judges an end."""


@dataclass(frozen=True)
class Counterexample:
    """The shortest way to something wrong."""

    problem: str
    steps: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{number:3}. {step}" for number, step in enumerate(self.steps, 1)]
        return "\n".join([*lines, f"     WRONG: {self.problem}"])


@dataclass(frozen=True)
class Explored:
    num_states: int
    num_steps: int
    num_ends: int
    wrong: Counterexample | None


def explore(
    initial: object,
    steps: Callable[[object], Iterable[Callable[[], Step | None]]],
    check_end: Callable[[object], None],
    *,
    most_states: int = 2_000_000,
) -> Explored:
    """Visit every state from `initial` on.

    `steps` gives of a state what may happen next, each a function that makes it happen, or None if it can't;
    `check_end` judges a state where nothing can. A state that can be reached from itself is wrong, too: a run may then
    never end.
    """
    was_collecting = gc.isenabled()
    gc.disable()  # nothing here is a circle of references, and looking for one takes most of the time
    try:
        return _explore(initial, steps, check_end, most_states)
    finally:
        if was_collecting:
            gc.enable()


def _explore(initial, steps, check_end, most_states: int) -> Explored:
    numbers = {initial: 0}
    states = [initial]
    came_from: list[tuple[int, str]] = [(-1, "")]
    edges: list[list[int]] = []
    num_steps = num_ends = 0

    def trace(number: int, *more: str) -> tuple[str, ...]:
        words = list(more)
        while number:
            number, word = came_from[number]
            words.insert(0, word)
        return tuple(words)

    def outcome(wrong: Counterexample | None) -> Explored:
        return Explored(len(states), num_steps, num_ends, wrong)

    while len(edges) < len(states):
        number, after = len(edges), []
        edges.append(after)
        for step in steps(states[number]):
            try:
                made = step()
            except Wrong as wrong:
                problem, *last = wrong.args
                return outcome(Counterexample(problem, trace(number, *last)))
            if made is None:
                continue
            word, state = made
            num_steps += 1
            if state not in numbers:
                numbers[state] = len(states)
                states.append(state)
                came_from.append((number, word))
                assert len(states) <= most_states, "too many states: bound the world"
            after.append(numbers[state])
        if not after:
            num_ends += 1
            try:
                check_end(states[number])
            except Wrong as wrong:
                return outcome(Counterexample(wrong.args[0], trace(number)))
    circle = _on_a_circle(edges)
    if circle is not None:
        return outcome(Counterexample("this goes on for ever", trace(circle)))
    return outcome(None)


def _on_a_circle(edges: list[list[int]]) -> int | None:
    """Return a state that can be reached again from itself; None if there is none."""
    num_before = [0] * len(edges)
    for after in edges:
        for state in after:
            num_before[state] += 1
    ready = [state for state, count in enumerate(num_before) if not count]
    num_sorted = 0
    while ready:
        num_sorted += 1
        for state in edges[ready.pop()]:
            num_before[state] -= 1
            if not num_before[state]:
                ready.append(state)
    return None if num_sorted == len(edges) else next(state for state, count in enumerate(num_before) if count)
