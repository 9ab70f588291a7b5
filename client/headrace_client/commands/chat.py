"""`headrace chat`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer
from headrace_core.errors import HeadraceError, InvalidRequestError

from headrace_client.arguments import sampling_of, service_level_of
from headrace_client.client import Client
from headrace_client.codec import Collector
from headrace_client.commands import logprobs, options
from headrace_client.commands.terminal import exit_code, report, stderr, stdout, write_text
from headrace_client.commands.waiting import Waiting
from headrace_client.results import ChatMessage
from headrace_client.sampling import SamplingParams
from headrace_client.service_level import ServiceLevel

HELP = """Talk to the model; it remembers the conversation.

Examples:
  headrace chat
  headrace chat --system "Answer in one sentence." --temperature 0.3

/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops the current answer. The model needs a \
chat template; one without it can be used with `headrace generate`.
"""

_PROMPT = "> "


def chat(  # the signature is the command line
    sampling: options.Answer,
    speed: options.Speed,
    router: options.WaitedRouter,
    system: Annotated[str, typer.Option(help="Instructions that come before the conversation.")] = "",
    model: Annotated[str, typer.Option(help="Model name; default: the one served.", show_default=False)] = "",
    timeout: options.Timeout = None,
) -> None:
    """Run the command. Raises what `Client.server_info` lists; `app` reports it."""
    params = sampling.params()
    sampling_of(params)[0].validate()
    level = service_level_of(speed.level())
    with router.connect() as client:
        info = client.server_info()
        stdout.print(f"{info.model_name} at {router.server}; /reset forgets, /exit ends", style="dim", markup=False)
        conversation = _Conversation(client, system, params, level, model, timeout, router.wait)
        code = conversation.run()
    if code:
        raise typer.Exit(code)


class _Conversation:
    def __init__(
        self,
        client: Client,
        system: str,
        sampling: SamplingParams,
        level: ServiceLevel,
        model: str,
        timeout_s: float | None,
        wait_s: float,
    ) -> None:
        self._client = client
        self._opening = [ChatMessage("system", system)] if system else []
        self._messages = list(self._opening)
        self._sampling = sampling
        self._level = level
        self._model = model
        self._timeout_s = timeout_s
        self._wait_s = wait_s

    def run(self) -> int:
        """Take turns until the input ends; return the last turn's exit code, so that scripts see a failure."""
        code = 0
        with contextlib.suppress(ImportError):
            # Importing it is what gives `input` line editing and history.
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
        while (line := _read_line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit":
                    return code
                case "/reset":
                    self._messages = list(self._opening)
                    stdout.print("forgotten", style="dim")
                case "/help":
                    stdout.print("/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer", style="dim")
                case text:
                    code = self._take_turn(text)
        return code

    def _take_turn(self, text: str) -> int:
        """Answer `text` and return the exit code that this turn alone would have; a failed turn leaves no trace."""
        messages = [*self._messages, ChatMessage("user", text)]
        try:
            answer, code = self._answer(messages)
        except HeadraceError as error:
            report(error)
            return exit_code(error)
        self._messages = [*messages, ChatMessage("assistant", answer)] if answer else self._messages
        return code

    def _answer(self, messages: list[ChatMessage]) -> tuple[str, int]:
        collector = Collector()
        has_text, code = False, 0
        try:
            with (
                self._client.stream(
                    messages, self._sampling, service_level=self._level, model=self._model, timeout_s=self._timeout_s
                ) as stream,
                Waiting(self._client, stream, limit_s=self._wait_s) as waiting,
            ):
                for delta in stream:
                    waiting.heard()
                    collector.add(delta)
                    has_text = True
                    write_text(delta.text)
        except KeyboardInterrupt:
            code = 130
        finally:
            if has_text:
                write_text("\n")
        if code:
            stdout.print("stopped", style="dim")
        if not has_text:
            return "", code
        (answer,) = collector.generation().samples
        if self._sampling.top_logprobs is not None:
            stderr.print(logprobs.table(answer))
        return answer.text, code


def _read_line() -> str | None:
    """Return the next line; None when the input ended or was interrupted.

    Raises:
        InvalidRequestError: BAD_REQUEST, the line is not UTF-8.
    """
    try:
        return input(_PROMPT if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        stdout.print()
        return None
    except UnicodeDecodeError:
        raise InvalidRequestError("BAD_REQUEST", "the input is not valid UTF-8") from None
