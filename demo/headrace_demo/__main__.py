"""Make the demo model: `python -m headrace_demo all --out DIR --minutes N`.

`train` learns the tokenizer and trains, `export` writes the checkpoint, `evaluate` measures it and
writes its card, `all` does the three in turn; `stories` shows what the model learns from.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from headrace_demo.export import MAX_TOKENS, write_checkpoint
from headrace_demo.network import Network, Shape
from headrace_demo.story_grammar import write_story
from headrace_demo.tokenizer import train_tokenizer, write_tokenizer
from headrace_demo.train import Plan, train

_log = logging.getLogger("headrace_demo")
_STEPS = {
    "train": ("train",),
    "export": ("export",),
    "evaluate": ("evaluate",),
    "all": ("train", "export", "evaluate"),
}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="headrace_demo", description=__doc__)
    parser.add_argument("step", choices=[*sorted(_STEPS), "stories"])
    parser.add_argument("--out", type=Path, default=Path("demo/model"), help="the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"), help="weights of the run")
    parser.add_argument("--minutes", type=float, default=76.0, help="training by the clock")
    parser.add_argument("--steps", type=int, help="train so many steps instead; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the run, or of the story shown")
    parser.add_argument("--processes", type=int, default=2, help="one core each")
    parser.add_argument("--prompts", type=int, default=200, help="of the gate")
    return parser.parse_args(arguments)


def _train(options: argparse.Namespace, shape: Shape) -> None:
    _log.info("learning a vocabulary of %d tokens", shape.vocab_size)
    write_tokenizer(train_tokenizer(shape.vocab_size), options.work, max_tokens=MAX_TOKENS)
    plan = Plan(
        folder=options.work,
        minutes=options.minutes,
        steps=options.steps,
        num_processes=options.processes,
        seed=options.seed,
    )
    train(plan, shape)


def _export(options: argparse.Namespace, shape: Shape) -> None:
    network = Network(shape)
    network.load_state_dict(torch.load(options.work / "weights.pt", weights_only=True))
    write_checkpoint(network, options.out)
    tokenizer = Tokenizer.from_file(str(options.work / "tokenizer.json"))
    write_tokenizer(tokenizer, options.out, max_tokens=MAX_TOKENS)
    _log.info("wrote %s", options.out)


def _evaluate(options: argparse.Namespace) -> None:
    from headrace_demo.evaluate import evaluate  # transformers takes seconds to import
    from headrace_demo.model_card import Run, model_card

    figures = evaluate(options.out, num_prompts=options.prompts)
    record = options.work / "run.json"
    run = Run(**json.loads(record.read_text(encoding="utf-8"))) if record.exists() else None
    card = model_card(figures, num_prompts=options.prompts, run=run)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    _log.info("%s", card)


def main(arguments: list[str]) -> None:
    """Do the step that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parse(arguments)
    if options.step == "stories":
        sys.stdout.write(write_story(Random(options.seed)).text + "\n")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    for step in _STEPS[options.step]:
        if step == "train":
            _train(options, shape)
        elif step == "export":
            _export(options, shape)
        else:
            _evaluate(options)


if __name__ == "__main__":
    main(sys.argv[1:])
