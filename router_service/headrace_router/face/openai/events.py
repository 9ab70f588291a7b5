"""An answer as server-sent events: what does not change is made once, and a token is a few texts joined.

    data: {"id":…,"object":…,"created":…,"model":…,"choices":[{"index":0,"delta":{"content":"…"},…}]}
    data: {…,"choices":[],"usage":{…}}       if `stream_options.include_usage`
    data: [DONE]

A piece without text has no event, unless counts, log-probabilities or token ids are wanted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from headrace_core.errors import HeadraceError

from headrace_router.face.http.errors import body_of
from headrace_router.face.openai.about import About
from headrace_router.face.openai.parts import CompletionLogprobs, Counts, chat_logprobs, finish_word, quoted
from headrace_router.face.openai.said import Reader
from headrace_router.requests.piece import Piece

_DONE = "data: [DONE]\n\n"


class Events:
    """One answer's. `take` each piece in order, then `last` once."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._is_chat = about.wanted.is_chat
        self._counts = Counts(about.num_prompt_tokens, about.num_samples)
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        self._head = (
            f'data: {{"id":{quoted(about.answer_id)},"object":"{kind}","created":{about.created_s},'
            f'"model":{quoted(about.model)},"choices":['
        )
        text = '"delta":{"content":' if self._is_chat else '"text":'
        self._heads = [f'{self._head}{{"index":{index},{text}' for index in range(about.num_choices)]
        self._first_heads = [each.replace('{"content"', '{"role":"assistant","content"') for each in self._heads]
        self._middle = "}," if self._is_chat else ","
        options = about.wanted.options
        self._is_counted_always = options.continuous_usage_stats
        self._tail = ',"usage":null}\n\n' if options.include_usage else "}\n\n"
        self._plain = f'{self._middle}"logprobs":null,"finish_reason":null}}]{self._tail}'
        """What follows the text of most pieces."""
        self._is_plain = not (self._is_counted_always or about.wanted.has_logprobs or about.wanted.has_token_ids)
        make = about.make_reader
        self._readers = [make() for _ in range(about.num_choices)] if make else []
        self.is_short = self._is_plain and not self._readers
        """Whether most pieces are their text alone, as `plain` has it."""
        num_shown = about.num_choices if about.wanted.has_logprobs else 0
        self._logprobs = [CompletionLogprobs(about.token_bytes, about.hides) for _ in range(num_shown)]

    def take(self, piece: Piece) -> str:
        """Return the events of a piece; empty if it has none."""
        ending, index = piece.ending, piece.sample_index
        if self.is_short and ending is None and not piece.is_first:
            return self.plain(index, piece.text, len(piece.token_ids))
        self._counts.add(index, len(piece.token_ids), ending)
        if self._readers:
            return self._read(piece, self._readers[index])
        if piece.is_first:
            prompt = index // self._about.num_samples
            return self._rest(piece, self._first_heads[index], self._about.prompt_texts[prompt] + piece.text)
        return self._rest(piece, self._heads[index], piece.text)

    def plain(self, index: int, text: str, num_tokens: int) -> str:
        """Return the event of a choice's text, not its first and not its last; if `is_short`."""
        self._counts.num_output += num_tokens
        return f"{self._heads[index]}{quoted(text)}{self._plain}" if text else ""

    def last(self) -> str:
        """Return the events after the last piece."""
        if not self._about.wanted.options.include_usage:
            return _DONE
        return f'{self._head}],"usage":{self._counts.usage()}}}\n\n{_DONE}'

    def _read(self, piece: Piece, reader: Reader) -> str:
        """Return the event of a piece whose text may say several things; none if it says nothing yet."""
        said = reader.push(piece.text)
        if piece.ending is not None:
            said += reader.finish()
        if not (said or piece.is_first or piece.ending is not None) and self._is_plain:
            return ""
        delta: dict[str, Any] = {"role": "assistant"} if piece.is_first else {}
        if said.content or not (said or piece.ending is not None):
            delta["content"] = said.content
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.calls:
            delta["tool_calls"] = said.calls
        head = f'{self._head}{{"index":{piece.sample_index},"delta":{json.dumps(delta, separators=(",", ":"))}'
        return self._rest(piece, head, None, has_called=reader.num_calls > 0)

    def _rest(self, piece: Piece, head: str, text: str | None, *, has_called: bool = False) -> str:
        """Return an event; `text` None: the head has it, and what is around it, already."""
        about, ending = self._about, piece.ending
        parts = [
            head,
            "," if text is None else f"{quoted(text)}{self._middle}",
            '"logprobs":',
            self._logprobs_of(piece),
        ]
        if ending is None:
            parts.append(',"finish_reason":null')
        else:
            parts.append(f',"finish_reason":"{finish_word(ending.finish_reason, has_called=has_called)}"')
            if ending.matched_stop_string:
                parts.append(f',"stop_reason":{quoted(ending.matched_stop_string)}')
        if about.wanted.has_token_ids:
            parts.append(f',"token_ids":{_ids(piece.token_ids)}')
        has_prompt_ids = about.wanted.has_token_ids and piece.is_first
        prompt_ids = (
            f',"prompt_token_ids":{_ids(about.prompts[piece.sample_index // about.num_samples])}'
            if has_prompt_ids
            else ""
        )
        parts.append(f"}}]{prompt_ids}" if self._is_chat else f"{prompt_ids}}}]")
        parts.append(f',"usage":{self._counts.usage()}}}\n\n' if self._is_counted_always else self._tail)
        return "".join(parts)

    def _logprobs_of(self, piece: Piece) -> str:
        index, wanted = piece.sample_index, self._about.wanted
        if piece.prompt_logprobs is not None or (piece.is_first and wanted.echo and wanted.has_logprobs):
            prompt = self._about.prompts[index // self._about.num_samples]
            said = self._logprobs[index].take_prompt(prompt, piece.prompt_logprobs)
            more = self._logprobs[index].take(piece.token_ids, piece.logprobs)
            return json.dumps({name: values + more[name] for name, values in said.items()})
        if not piece.logprobs:
            return "null"
        if not self._is_chat:
            return json.dumps(self._logprobs[index].take(piece.token_ids, piece.logprobs))
        content = chat_logprobs(piece.token_ids, piece.logprobs, self._about.token_bytes)
        return json.dumps({"content": content, "refusal": None})


def error_event(error: HeadraceError) -> str:
    """Return the event that an answer ends with which `error` cut short."""
    return f"event: error\ndata: {body_of(error)}\n\n"


def _ids(token_ids: Sequence[int]) -> str:
    return f"[{','.join(map(str, token_ids))}]"
