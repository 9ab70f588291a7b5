"""`headrace generate`."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from typing import Annotated, Any

import typer
from headrace_core.errors import InvalidRequestError

from headrace_client.client import Client
from headrace_client.codec import Collector
from headrace_client.commands import logprobs, options
from headrace_client.commands.terminal import read_prompt, stderr, write_text
from headrace_client.commands.waiting import Waiting
from headrace_client.commands.waterfall import waterfall
from headrace_client.results import ChatMessage, Generation, Prompt
from headrace_client.sampling import SamplingParams
from headrace_client.service_level import ServiceLevel

HELP = """Generate text from a prompt and stream it to standard output.

Examples:
  headrace generate "Once upon a time"
  headrace generate "Once upon a time" --temperature 0 --max-tokens 50 --timings
  headrace generate --chat "Tell me a story about a fox named Zorvim."
  cat prompt.txt | headrace generate - --stop "The end."
  headrace generate "Once upon a time" --slo-class interactive --slo-ttft-ms 500
  headrace generate "Once upon a time" --max-tokens 9 --top-logprobs 3
  headrace generate --tokens "0 17 42" --json

Text goes to standard output and nothing else does, so it can be piped; timings and log-probabilities go to standard \
error. A prompt from standard input loses one newline at its end.
"""


def generate(  # the signature is the command line
    sampling: options.Sampling,
    speed: options.Speed,
    router: options.WaitedRouter,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; `-` reads standard input.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="IDS", help='Token ids instead of text: "0 17 42".')] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message of a conversation.")
    ] = False,
    n: Annotated[
        int, typer.Option("-n", help="Independent samples, 1 to 16; several are shown when all are done.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON when it is done.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Show where the time went, on standard error.")] = False,
    model: Annotated[str, typer.Option(help="Model name; default: the one served.", show_default=False)] = "",
    request_id: Annotated[
        str, typer.Option(help="Name for logs; default: the router chooses.", show_default=False)
    ] = "",
    timeout: options.Timeout = None,
) -> None:
    """Run the command. Raises what `Client.generate` lists; `app` reports it."""
    job = _Job(
        _prompt(prompt, tokens, is_chat=chat), sampling.params(), speed.level(), n, model, request_id, timeout, timings,
        router.wait,
    )  # fmt: skip
    with router.connect() as client:
        result = job.run(client, is_streamed=not as_json and n == 1)
    if as_json:
        write_text(json.dumps(to_plain(result), ensure_ascii=False) + "\n")
    elif n > 1:
        for index, sample in enumerate(result.samples):
            write_text(f"--- sample {index} ({sample.finish_reason.value})\n{sample.text}\n")
    if not as_json:
        _explain(result, has_logprobs=sampling.top_logprobs is not None, has_timings=timings)


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    prompt: Prompt
    sampling: SamplingParams
    service_level: ServiceLevel
    n: int
    model: str
    request_id: str
    timeout_s: float | None
    include_timings: bool
    wait_s: float

    def run(self, client: Client, *, is_streamed: bool) -> Generation:
        """Generate; when streamed, write the text as it comes and end it with a newline, also when it fails."""
        collector = Collector()
        has_text = False
        try:
            with (
                client.stream(
                    self.prompt,
                    self.sampling,
                    service_level=self.service_level,
                    n=self.n,
                    model=self.model,
                    request_id=self.request_id,
                    timeout_s=self.timeout_s,
                    include_timings=self.include_timings,
                ) as stream,
                Waiting(client, stream, limit_s=self.wait_s) as waiting,
            ):
                for delta in stream:
                    waiting.heard()
                    collector.add(delta)
                    if is_streamed:
                        write_text(delta.text)
                        has_text = True
        finally:
            if has_text:
                write_text("\n")
        return collector.generation()


def _prompt(prompt: str | None, tokens: str | None, *, is_chat: bool) -> Prompt:
    if (prompt is None) == (tokens is None):
        raise InvalidRequestError("BAD_REQUEST", "give either a PROMPT (or `-` for standard input) or --tokens")
    if tokens is not None:
        return options.parse_token_ids(tokens)
    text = read_prompt(prompt or "")
    return [ChatMessage("user", text)] if is_chat else text


def _explain(result: Generation, *, has_logprobs: bool, has_timings: bool) -> None:
    """Show what was asked for besides the text."""
    for sample in result.samples:
        if has_logprobs:
            stderr.print()
            stderr.print(logprobs.table(sample))
        if has_timings and sample.timings:
            stderr.print()
            stderr.print(waterfall(sample.timings, sample.usage))


def to_plain(value: Any) -> Any:
    """Return dataclasses as dicts, enums as their values and bytes as text, all the way down, for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value
