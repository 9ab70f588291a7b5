"""The model card: what the checkpoint is, and the figures that were measured on it."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_demo.evaluate import Figures

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [deepseek_v3, tiny, stories]
---

# Headrace demo model

A DeepSeek-V3 in small: {num_weights:.2f}M weights ({num_active:.2f}M of the trunk, with embedding and head,
work on each token), {size:.1f} MB in bfloat16. It has every part of the large one (latent attention with a
low-rank query, one dense layer, routed experts in groups with a shared expert and correction
biases, one multi-token-prediction layer) and tells short stories in simple English. It is there to
show and to test Headrace on a laptop; it knows nothing but its stories.

**Data.** Stories made by rule by `demo/headrace_demo/story_grammar.py`, our own text and no one
else's. Heroes have invented names; one name in ten is held out of training.

**Licence.** Apache-2.0.

**Use.** `Once upon a time, a little fox named Zorvim`, or as a chat, `Tell me a story about a bear
named Zimbo.` The chat template is in `tokenizer_config.json`. Stories run to about 230 tokens; the
model was trained on windows of 288, and what it writes beyond that is not to be relied on.

**Limits.** It keeps its hero, not yet everything else: what a request asks to happen is often passed
over, "he" may turn into "she", and a meal or a helper may change on the way. A name that is the very
first word of a text, with no space before it, is often copied wrongly. English only, stories only.

## Figures

Measured by `python -m headrace_demo evaluate --out demo/model` (with `demo` on the path), on
{num_prompts} prompts with heroes that never stood in training text.

| figure | greedy | temperature 0.7 |
|---|--:|--:|
| stories that go on with their hero's name (the gate: 70 %) | {greedy.kept:.1%} | {sampled.kept:.1%} |
| of all: say it three times or more, and no other name | {greedy.faithful:.1%} | {sampled.faithful:.1%} |
| stories that come to an end by themselves | {greedy.ended:.1%} | {sampled.ended:.1%} |

| figure | value |
|---|--:|
| validation loss, nats per token | {validation_loss:.4f} |
| multi-token prediction: drafts the trunk agrees with | {draft_agreement:.1%} |
| load of the experts, largest over mean, by layer | {loads} |
| largest difference of a logit from transformers (float32) | {logits_error:.1e} |

{training}

## A story

Greedy, on the first prompt of the gate:

{sample}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """How a training run went, as `train.py` left it in `run.json`."""

    steps: int
    tokens: int
    seconds: int
    processes: int
    minutes: float | None
    """What was asked for; None when the run was to end after `steps`."""
    seed: int


def _describe(run: Run | None) -> str:
    if run is None:
        return "Made by `python -m headrace_demo all` (with `demo` on the path)."
    end = f"--steps {run.steps}" if run.minutes is None else f"--minutes {run.minutes:g}"
    return (
        f"Made by `python -m headrace_demo all {end} --processes {run.processes}` (with `demo` on the path): "
        f"{run.tokens / 1e6:.1f}M tokens in {run.steps} steps and {run.seconds / 60:.0f} minutes, "
        f"on {run.processes} shared CPU cores, seed {run.seed}. A run that ends by the clock takes as many steps as "
        "its machine allows; `--steps` makes the same run every time."
    )


def model_card(figures: Figures, *, num_prompts: int, run: Run | None) -> str:
    """Write the card from what was measured on `num_prompts` prompts, and from how the run went."""
    return _CARD.format(
        num_weights=figures.num_weights / 1e6,
        num_active=figures.num_active_weights / 1e6,
        size=figures.size_bytes / 1e6,
        num_prompts=num_prompts,
        greedy=figures.greedy,
        sampled=figures.sampled,
        validation_loss=figures.validation_loss,
        draft_agreement=figures.draft_agreement,
        loads=", ".join(f"{load:.2f}" for load in figures.expert_load),
        logits_error=figures.logits_error,
        training=_describe(run),
        sample="\n".join(f"> {line}".rstrip() for line in figures.greedy.sample.splitlines()),
    )
