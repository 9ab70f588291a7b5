"""What the tests of decode plans share: a small scheduler, sequences for it, and a step that answers itself."""

from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_decode.events import PagesReady
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.speculation import NO_DRAFTS

LIMITS = ModelLimits(vocab_size=1000, max_context_tokens=60, eos_token_ids=(0,))


PAGE = 2


def scheduler(
    num_pages=32, max_step_tokens=8, max_step_sequences=4, max_waiting=100, speculation=NO_DRAFTS
) -> DecodeScheduler:
    return DecodeScheduler(
        PageAllocator(num_pages, PAGE),
        LIMITS,
        max_step_tokens=max_step_tokens,
        max_step_sequences=max_step_sequences,
        max_waiting_sequences=max_waiting,
        speculation=speculation,
    )


def spec(tokens: list[int], *, num_output=0, sample_index=0, **params) -> SequenceSpec:
    params = {"max_tokens": 50} | params
    return SequenceSpec("r", 1, sample_index, tokens, len(tokens) - num_output, SamplingParams(seed=1, **params))


def prompt(key: int, length: int) -> list[int]:
    """Return a prompt that shares no page with another key's."""
    return [key] * length


def step(s: DecodeScheduler, *, now=0.0, token=5) -> StepPlan:
    """Plan and answer a step; every token sampled is `token`."""
    plan = s.plan(now)
    assert plan is not None, "nothing to compute"
    s.apply(StepResult({c.key: [SampledToken(token)] for c in plan.chunks if c.is_sampled}, 0.0), now)
    return plan


def shares(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """Return (key, start, number of tokens) of each chunk."""
    return [(chunk.key, chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] if plan else []


def running(s: DecodeScheduler, *lengths: int) -> None:
    """Add sequences 1, 2, ... with prompts of these lengths and compute their prompts."""
    for key, length in enumerate(lengths, start=1):
        s.add(key, spec(prompt(key, length)), 0.0)
    while any(chunk.start == 0 for chunk in step(s).chunks):
        pass
    s.take_events()


def handed_off(s: DecodeScheduler, key: int, tokens: list[int], now=0.0, **params) -> PagesReady:
    """Add a sequence whose pages are on their way."""
    s.add(key, spec(tokens, **params), now, has_handoff=True)
    s.plan(now)
    return next(event for event in s.take_events() if isinstance(event, PagesReady) and event.key == key)
