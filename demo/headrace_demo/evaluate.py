"""The gate: does a story keep a hero it has never heard of, and is the checkpoint sound?

Two hundred prompts name heroes of held-out names, half as chats and half as openings to go on
with. transformers' own DeepSeek-V3 reads the checkpoint and writes the stories, greedily and at
temperature 0.7. A story keeps its hero if it says the name again; it is faithful if it says it
three times or more and no other name. Fidelity to transformers, validation loss, the load of the
experts and the agreement of the MTP module are measured beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from headrace_demo import hero_names, story_words
from headrace_demo.export import from_checkpoint
from headrace_demo.network import Network
from headrace_demo.story_grammar import write_story
from headrace_demo.stream import Rows, RowStream, validation_rows
from headrace_demo.train import weighted_loss

_CHATS = (
    "Tell me a story about a {kind} named {name}.",
    "Write a story about {name} the {kind}.",
    "Please tell me a story about a {trait} {kind} called {name}.",
)
_OPENINGS = (
    "Once upon a time, a little {kind} named {name}",
    "Once upon a time there was a {trait} {kind} named {name}.",
    "There once was a {trait} {kind} called {name}",
)
_CAPITALISED = re.compile(r"\b[A-Z][a-z]+")
_BATCH = 100
_MAX_NEW_TOKENS = 320
_WINDOW = 288


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question of the gate."""

    hero: str
    text: str
    is_chat: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the gate went; shares of all prompts, 0 to 1."""

    kept: float
    """Stories that say the hero's name again."""
    faithful: float
    """Stories that say it three times or more, and no other name."""
    ended: float
    """Stories that came to their end by themselves."""
    sample: str
    """The first prompt and its story."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is measured on a checkpoint."""

    greedy: Verdict
    sampled: Verdict
    validation_loss: float
    """Nats per token."""
    draft_agreement: float
    """Share of tokens where the MTP module drafts what the trunk then says, greedily."""
    logits_error: float
    """Largest difference from transformers, float32 arithmetic on the same weights."""
    expert_load: tuple[float, ...]
    """Largest over mean load, for each expert layer of the trunk."""
    num_weights: int
    num_active_weights: int
    """Of the trunk, per token, with embedding and head."""
    size_bytes: int


def make_prompts(count: int, *, seed: int = 4242) -> list[Prompt]:
    """Make `count` prompts, chats and openings in turn, each with a new held-out hero."""
    rng = Random(seed)
    prompts: list[Prompt] = []
    for index in range(count):
        is_chat = index % 2 == 0
        name = hero_names.held_out_name(rng)
        kind, trait = rng.choice(list(story_words.ANIMALS)), rng.choice(story_words.TRAITS)
        wording = rng.choice(_CHATS if is_chat else _OPENINGS)
        text = wording.format(name=name, kind=kind, trait=trait)
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        prompts.append(Prompt(name, text, is_chat))
    return prompts


def known_capitals(num_stories: int = 3000) -> set[str]:
    """Collect the capitalised words that stories use beside the names of their heroes."""
    rng = Random(31)
    words: set[str] = set()
    for _ in range(num_stories):
        story = write_story(rng)
        words |= set(_CAPITALISED.findall(story.text)) - {story.hero}
    return words


def _generate(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], **how: Any) -> list[str]:
    texts: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, tokenize=False
        )
        if prompt.is_chat
        else f"{tokenizer.bos_token}{prompt.text}"
        for prompt in prompts
    ]
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=_MAX_NEW_TOKENS,
        **how,
    )
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :])


def judge(prompts: list[Prompt], stories: list[str], known: set[str]) -> Verdict:
    """Judge `stories`, decoded with their special tokens, one for each of `prompts`."""
    kept = faithful = ended = 0
    for prompt, story in zip(prompts, stories, strict=True):
        told, end, _ = story.partition("<|eos|>")
        names = _CAPITALISED.findall(told)
        uses = names.count(prompt.hero)
        kept += uses > 0
        faithful += uses >= 3 and not set(names) - known - {prompt.hero}
        ended += bool(end)
    count = len(prompts)
    told = stories[0].partition("<|eos|>")[0]
    sample = f"{prompts[0].text}\n\n{told}" if prompts[0].is_chat else prompts[0].text + told
    return Verdict(kept / count, faithful / count, ended / count, sample)


@torch.no_grad()
def measure_load(network: Network, rows: Rows) -> tuple[float, ...]:
    """Return the largest over the mean load of each expert layer of the trunk on `rows`."""
    network.train()(rows.ids[:, :-1])
    layers = network.eval().expert_layers()[:-1]
    return tuple(float(layer.count.max() / layer.count.mean()) for layer in layers)


@torch.no_grad()
def measure_losses(network: Network, rows: Rows) -> tuple[float, float]:
    """Return the validation loss per token and the draft agreement on `rows`."""
    ids = rows.ids[:, :-1]
    hidden = network(ids)
    logits = network.lm_head(hidden)
    loss = weighted_loss(logits, rows.ids[:, 1:], rows.weights).item()
    drafted = network.lm_head(network.draft(hidden, ids)).argmax(-1)
    counted = rows.weights[:, 1:] > 0
    agreed = (logits.argmax(-1)[:, 1:] == drafted) & counted
    return loss, agreed.sum().item() / counted.sum().item()


def count_active(network: Network) -> int:
    """Count the weights of the trunk that work on one token, with embedding and head."""
    shape = network.shape
    routed = sum(e.gate_up.numel() + e.down.numel() for e in network.expert_layers()[:-1])
    idle = routed * (shape.n_routed_experts - shape.num_experts_per_tok) // shape.n_routed_experts
    mtp = sum(weight.numel() for weight in network.mtp.parameters())
    return sum(weight.numel() for weight in network.parameters()) - mtp - idle


@torch.no_grad()
def evaluate(folder: Path, *, num_prompts: int = 200) -> Figures:
    """Measure the checkpoint in `folder`; takes minutes on one core."""
    network = from_checkpoint(folder)
    weights = folder / "model.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = validation_rows(bare, num_tokens=_WINDOW, num_rows=96)
    packed = RowStream(bare, seed=999_979, num_tokens=_WINDOW).next_rows(96)
    ids = rows.ids[:4, :-1]
    difference = model(ids, use_cache=False).logits - network.lm_head(network(ids))
    loss, agreement = measure_losses(network, rows)
    prompts, known = make_prompts(num_prompts), known_capitals()
    verdicts: list[Verdict] = []
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 0}):
        torch.manual_seed(7)
        stories: list[str] = []
        for start in range(0, num_prompts, _BATCH):
            batch = prompts[start : start + _BATCH]
            stories += _generate(model, tokenizer, batch, **how)
        verdicts.append(judge(prompts, stories, known))
    return Figures(
        greedy=verdicts[0],
        sampled=verdicts[1],
        validation_loss=loss,
        draft_agreement=agreement,
        logits_error=difference.abs().max().item(),
        expert_load=measure_load(network, packed),
        num_weights=sum(weight.numel() for weight in network.parameters()),
        num_active_weights=count_active(network),
        size_bytes=weights.stat().st_size,
    )
