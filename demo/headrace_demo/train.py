"""Training: a few single-threaded processes on the CPU that add up their gradients.

The learning rate warms up, stays, and falls along a cosine in the second half of the run. The MTP
module learns in the last part, on hidden states whose gradient is cut off, so the trunk is the
same with or without it. The bias that balances the experts moves by a fixed step towards the
experts with too little load (auxiliary-loss-free balancing, DeepSeek-V3 report, section 2.1.2).

A run ends by the clock (`minutes`) or after a number of steps (`steps`); only the latter is the
same every time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from headrace_demo.muon import Muon
from headrace_demo.network import Network, Shape
from headrace_demo.stream import Rows, RowStream, repeat_share, validation_rows

_log = logging.getLogger(__name__)
_NOT_MUON = ("embed_tokens", "lm_head", "norm")
_WARMUP_STEPS = 40
_BALANCE_WEIGHT = 1e-3
_BIAS_STEP = 1e-2


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    folder: Path
    """Holds `tokenizer.json`; gets `weights.pt`."""
    minutes: float = 80.0
    steps: int | None = None
    """When set, the run takes this many steps and the clock does not matter."""
    num_processes: int = 2
    num_rows: int = 8
    """Rows per process and step."""
    num_tokens: int = 288
    seed: int = 0
    adam_lr: float = 3e-3
    muon_lr: float = 0.02
    mtp_from: float = 0.7
    """The share of the run after which the MTP module learns too."""
    save_every_s: float = 300.0
    log_every: int = 25


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Average the cross entropy of `logits` [B, T, V] over `targets` [B, T] by `weights`."""
    flat = F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return (flat * weights.reshape(-1)).sum() / weights.sum().clamp_min(1.0)


def is_matrix(name: str, weight: nn.Parameter) -> bool:
    """Tell whether Muon moves this weight: a matrix that is not embedding, head, router or norm."""
    is_router = name.endswith("mlp.gate")
    return weight.dim() >= 2 and not is_router and not any(part in name for part in _NOT_MUON)


class Optimisers:
    """Muon for the matrices, AdamW for the rest, of one part of the network."""

    def __init__(self, weights: dict[str, nn.Parameter], plan: Plan) -> None:
        self.weights = list(weights.values())
        self._plan = plan
        self._muon = Muon([w for n, w in weights.items() if is_matrix(n, w)])
        others = [w for n, w in weights.items() if not is_matrix(n, w)]
        groups = [
            {"params": [w for w in others if w.dim() >= 2], "weight_decay": 0.1},
            {"params": [w for w in others if w.dim() < 2], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr=plan.adam_lr, betas=(0.9, 0.95), fused=True)

    def step(self, scale: float) -> None:
        """Clip, move the weights at `scale` times the full learning rate, drop the gradients."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = self._plan.adam_lr * scale
        self._muon.lr = self._plan.muon_lr * scale
        self._adam.step()
        self._muon.step()
        for weight in self.weights:
            weight.grad = None


class Trainer:
    """One process of a run; all processes hold the same weights after every step."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, shape: Shape, *, rank: int = 0) -> None:
        self.network = Network(shape, seed=plan.seed).train()
        self._plan = plan
        self._rank = rank
        self._stream = RowStream(tokenizer, seed=plan.seed * 1000 + rank + 1, num_tokens=plan.num_tokens)
        self._validation = validation_rows(tokenizer, num_tokens=plan.num_tokens)
        named = dict(self.network.named_parameters())
        self._trunk = Optimisers({n: w for n, w in named.items() if not n.startswith("mtp.")}, plan)
        self._mtp = Optimisers({n: w for n, w in named.items() if n.startswith("mtp.")}, plan)
        self._mtp_steps = 0
        self._loads: list[float] = []
        self._started = time.monotonic()
        self.step_index = 0

    def progress(self) -> float:
        """Return the share of the run that is over; the same in every process."""
        if self._plan.steps is not None:
            return self.step_index / self._plan.steps
        elapsed = (time.monotonic() - self._started) / (self._plan.minutes * 60)
        shared = torch.tensor([elapsed])
        if self._plan.num_processes > 1:
            dist.broadcast(shared, 0)
        return shared.item()

    def _sum_up(self, parts: list[Tensor]) -> None:
        """Replace `parts` by their mean over the processes."""
        if self._plan.num_processes == 1:
            return
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        flat /= self._plan.num_processes
        for part, mean in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(mean.view_as(part))

    def _start_mtp(self) -> None:
        """Let the MTP module begin as a copy of the last layer that averages its two inputs."""
        mtp, hidden = self.network.mtp, self.network.shape.hidden_size
        mtp.block.load_state_dict(self.network.layers[-1].state_dict())
        half = 0.5 * torch.eye(hidden)
        with torch.no_grad():
            mtp.eh_proj.weight.mul_(0.5).add_(torch.cat([half, half], 1))

    def _losses(self, rows: Rows, *, with_mtp: bool) -> tuple[Tensor, Tensor]:
        """Return the loss of the trunk and of the MTP module (0 when it does not learn yet)."""
        network, ids = self.network, rows.ids
        with torch.autocast("cpu", torch.bfloat16):
            hidden = network(ids[:, :-1])
            logits = network.lm_head(hidden)
        loss = weighted_loss(logits, ids[:, 1:], rows.weights)
        if not with_mtp:
            return loss, torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            drafted = F.linear(network.draft(hidden, ids[:, :-1]), network.lm_head.weight.detach())
        return loss, weighted_loss(drafted, ids[:, 2:], rows.weights[:, 1:])

    def _balance(self, progress: float) -> None:
        """Move the correction biases by the load of this step, and clear the counts."""
        layers = self.network.expert_layers()
        self._sum_up([layer.count for layer in layers])
        speed = _BIAS_STEP * min(1.0, 2 * (1 - progress))
        self._loads = []
        for layer in layers:
            if layer.count.sum() > 0:
                mean = layer.count.mean()
                self._loads.append(float(layer.count.max() / mean))
                layer.bias += speed * torch.sign(mean - layer.count)
            layer.count.zero_()

    def step(self, progress: float) -> float:
        """Take one step and return its loss on this process's rows."""
        plan = self._plan
        with_mtp = progress >= plan.mtp_from
        if with_mtp and self._mtp_steps == 0:
            self._start_mtp()
        rows = self._stream.next_rows(plan.num_rows, share_of_repeats=repeat_share(progress))
        loss, mtp_loss = self._losses(rows, with_mtp=with_mtp)
        layers = self.network.expert_layers()[: None if with_mtp else -1]
        balance = torch.stack([layer.balance_loss for layer in layers]).sum()
        (loss + mtp_loss + _BALANCE_WEIGHT * balance).backward()
        parts = [self._trunk, self._mtp] if with_mtp else [self._trunk]
        grads = [w.grad for part in parts for w in part.weights if w.grad is not None]
        self._sum_up(grads)
        self.step_index += 1
        warm = min(1.0, self.step_index / _WARMUP_STEPS)
        late = max(0.0, progress - 0.5) / 0.5
        self._trunk.step(warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * late))))
        if with_mtp:
            self._mtp_steps += 1
            left = (1 - progress) / (1 - plan.mtp_from)
            self._mtp.step(0.7 * min(1.0, self._mtp_steps / 20) * (0.05 + 0.95 * left))
        self._balance(progress)
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss per token on stories that are not trained on."""
        self.network.eval()
        rows = self._validation
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network.lm_head(self.network(rows.ids[:, :-1]))
        self.network.train()
        return weighted_loss(logits, rows.ids[:, 1:], rows.weights).item()

    def save(self) -> None:
        """Write `weights.pt`; whoever reads it meanwhile sees the old file or the new one."""
        part = self._plan.folder / "weights.part"
        torch.save(self.network.state_dict(), part)
        part.replace(self._plan.folder / "weights.pt")

    def run(self) -> None:
        """Train to the end of the plan; process 0 logs and saves."""
        plan, saved = self._plan, time.monotonic()
        while (progress := self.progress()) < 1:
            loss = self.step(progress)
            if self._rank == 0 and self.step_index % plan.log_every == 0:
                self._report(progress, loss)
            if self._rank == 0 and time.monotonic() - saved > plan.save_every_s:
                saved = time.monotonic()
                self.save()
        if self._rank == 0:
            self._report(1.0, self.validate())
            self.save()
            self._write_record()

    def _num_tokens(self) -> int:
        """Return the tokens trained on so far, in all processes."""
        plan = self._plan
        return self.step_index * plan.num_rows * plan.num_tokens * plan.num_processes

    def _write_record(self) -> None:
        """Write `run.json`, from which the model card tells how the run went."""
        plan = self._plan
        record = {
            "steps": self.step_index,
            "tokens": self._num_tokens(),
            "seconds": round(time.monotonic() - self._started),
            "processes": plan.num_processes,
            "minutes": None if plan.steps else plan.minutes,
            "seed": plan.seed,
        }
        (plan.folder / "run.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def _report(self, progress: float, loss: float) -> None:
        elapsed = time.monotonic() - self._started
        plan, tokens = self._plan, self._num_tokens()
        text = (
            f"{progress:4.0%}  {elapsed:5.0f} s  step {self.step_index}  {tokens / 1e6:.2f}M tokens"
            f"  {tokens / elapsed:.0f} tokens/s  loss {loss:.3f}"
        )
        if self.step_index % (plan.log_every * 8) == 0 or progress >= 1:
            text += f"  validation {self.validate():.4f}"
        loads = " ".join(f"{load:.2f}" for load in self._loads)
        _log.info("%s  load max/mean %s", text, loads)


def _process(rank: int, plan: Plan, shape: Shape) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    if plan.num_processes > 1:
        meeting = (plan.folder / "meeting").absolute().as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=plan.num_processes)
    tokenizer = Tokenizer.from_file(str(plan.folder / "tokenizer.json"))
    Trainer(plan, tokenizer, shape, rank=rank).run()
    if plan.num_processes > 1:
        dist.destroy_process_group()


def train(plan: Plan, shape: Shape) -> None:
    """Run `plan` and leave the weights in `plan.folder / "weights.pt"`."""
    (plan.folder / "meeting").unlink(missing_ok=True)
    if plan.num_processes == 1:
        _process(0, plan, shape)
    else:
        spawn(_process, args=(plan, shape), nprocs=plan.num_processes)
