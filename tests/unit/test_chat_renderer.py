"""Chat templates: any template and any conversation end in bounded time and memory, and hurt nobody else."""

import asyncio
import contextlib
import errno
import os
import signal
import time
import warnings

import psutil
import pytest
from headrace_core.errors import DeadlineError, InvalidRequestError, UnavailableError
from headrace_core.shares import Caller
from headrace_core.testing.async_test import WAIT_S, eventually
from headrace_router.text import chat_renderer
from headrace_router.text.chat_protocol import Conversation, TemplateSource
from headrace_router.text.chat_renderer import ChatRenderer

LARGE = 1 << 20

# What the first message says is what the template does. Each would end or hold up a process that has no bounds.
HOSTILE = {
    "loops": (
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "it takes more than 0.5 s of computing",
    ),
    "loops over what the client sent": (
        "{% for a in messages[0].content * 40 %}{% for b in messages[0].content * 40 %}{% for c in range(9999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "it takes more than 0.5 s of computing",
    ),
    "one expression of C code": ("{{ 7 ** (messages | length * 10 ** 9) }}", "0.5 s of computing"),
    "one call of C code": ("{{ '%0900000000d' % 1 }}", "needs more than 256 MiB of memory"),
    "one text": ("{{ messages[0].content * 10 ** 9 }}", "needs more than 256 MiB of memory"),
    "doubling": (
        "{% set ns = namespace(t=[messages]) %}{% for a in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "needs more than 256 MiB of memory",
    ),
    "much output": ("{% for a in range(9000) %}{{ 'x' * 99999 }}{% endfor %}", "needs more than 256 MiB of memory"),
    "recursion": ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "RecursionError"),
    "division": ("{{ messages | length / 0 }}", "ZeroDivisionError"),
    "a name that is not there": ("{{ messages[0].tools.name }}", "has no attribute 'tools'"),
    "a type": ("{{ messages + 1 }}", "TypeError"),
    "a key": ("{{ messages[7].role }}", "has no element 7"),
    "an index": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "changing what it was given": ("{{ messages.append(1) }}", "unsafe"),
    "its own word": ("{{ raise_exception('only ' + messages[0].role) }}", "only user"),
    "its own long word": ("{{ raise_exception('no' * 10000) }}", "nonono ..."),
    "half a character": ("{{ '\\ud800' }}", "UnicodeEncodeError"),
}  # fmt: skip
CASES = "".join(f"{{% if messages[0].content == '{name}' %}}{what}{{% endif %}}" for name, (what, _) in HOSTILE.items())
TEMPLATE = CASES + "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """On a busy machine half a second of computing may take longer than a process may be silent."""
    monkeypatch.setattr(chat_renderer, "_SILENCE_S", WAIT_S)


CALLER = Caller("a", "one")


def later():
    return time.monotonic() + WAIT_S


def run(template, test, **options):
    async def main():
        source = None if template is None else TemplateSource({"default": template}, {"bos_token": "<bos>"})
        renderer = ChatRenderer(source, **{"max_text_bytes": 4 << 20, "cpu_s": 0.5, **options})
        renderer.start()
        try:
            await test(renderer)
        finally:
            await renderer.close()
        assert children() == []

    asyncio.run(main())


def children():
    """The processes that render."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "headrace_router.text.chat_process" in child.cmdline():
                found.append(child)
    return found


async def render(renderer, *contents, num_bytes=0, caller=CALLER, deadline_s=None):
    messages = [("user", content, "") for content in contents]
    return await renderer.render(Conversation(messages), num_bytes, caller, deadline_s=deadline_s or later())


async def refused(renderer, *contents):
    with pytest.raises(InvalidRequestError) as caught:
        await render(renderer, *contents)
    return caught.value


def test_hostile_templates_are_refused_and_the_next_conversation_is_answered():
    async def test(renderer):
        for name, (_, words) in HOSTILE.items():
            error = await refused(renderer, name)
            assert error.reason == "BAD_REQUEST", name
            assert words in str(error), name
            assert len(str(error)) < 400, name
            assert await render(renderer, "a", "é👩") == "<bos>[user]a[user]é👩", name

    run(TEMPLATE, test)


def test_a_text_past_the_limit_is_refused_with_its_size():
    async def test(renderer):
        assert len(await render(renderer, "x" * 89)) == 100
        error = await refused(renderer, "x" * 90)
        assert error.reason == "PROMPT_TOO_LONG"
        assert "101 bytes of the conversation; this router takes 100" in str(error)

    run(TEMPLATE, test, max_text_bytes=100)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "does not compile: Expected an expression"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{{ 1 | nonsense }}", "No filter named 'nonsense'"),
        ("{{ 7 ** (10 ** 9) }}", "does not compile: it takes more than 0.5 s of computing"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile: RecursionError"),
        (None, "this model has no chat template"),
    ],
)
def test_a_template_that_does_not_compile_refuses_conversations_only(template, words, caplog):
    async def test(renderer):
        for _ in range(2):
            error = await refused(renderer, "a")
            assert error.reason == "BAD_REQUEST"
            assert words in str(error)
            assert "send `text` or `tokens` instead of `chat`" in str(error)

        def num_logged():
            return sum(record.message == "chat requests will be refused" for record in caplog.records)

        if template is not None:
            await eventually(num_logged, "it is said once the check at the start has its turn")
        assert num_logged() == (template is not None)

    run(template, test)


def test_a_template_that_can_not_be_read_is_named_in_log_and_refusal(caplog):
    async def test(renderer):
        assert "it is a folder" in str(await refused(renderer, "a"))
        assert [record.problem for record in caplog.records] == ["it is a folder"]

    run(None, test, problem="it is a folder")


def test_a_process_that_was_killed_is_replaced_and_nobody_notices():
    async def test(renderer):
        assert await render(renderer, "a") == "<bos>[user]a"
        (child,) = children()
        child.kill()
        assert await render(renderer, "b") == "<bos>[user]b"
        assert children() != [child]

    run(TEMPLATE, test)


@pytest.mark.parametrize("what", ["socketpair", "Popen"])
def test_a_machine_that_has_no_room_for_a_process_is_told_and_nothing_stays_open(monkeypatch, what):
    async def test(renderer):
        assert await render(renderer, "a") == "<bos>[user]a"
        await _kill_children()
        module = chat_renderer.socket if what == "socketpair" else chat_renderer.subprocess
        before = os.listdir("/proc/self/fd")
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            patch.setattr(module, what, _no_room)
            for _ in range(3):
                with pytest.raises(UnavailableError, match="No file descriptors available") as caught:
                    await render(renderer, "b")
                assert caught.value.reason == "START_FAILED"
                del caught
            # Open ends are counted while whoever raised may still hold them: none may wait for the collector.
            assert len(os.listdir("/proc/self/fd")) <= len(before)
        assert await render(renderer, "c") == "<bos>[user]c"

    run(TEMPLATE, test)


async def _kill_children():
    for child in children():
        child.kill()
        await asyncio.to_thread(child.wait)


def _no_room(*_, **__):
    raise OSError(errno.EMFILE, "No file descriptors available")


def test_a_small_conversation_does_not_wait_for_large_ones():
    async def test(renderer):
        await render(renderer, "a", num_bytes=0)
        (small,) = children()
        await render(renderer, "a", num_bytes=LARGE)
        (large,) = (child for child in children() if child != small)
        large.suspend()
        held = [asyncio.create_task(render(renderer, "b", num_bytes=LARGE)) for _ in range(3)]
        for _ in range(20):
            assert await render(renderer, "c") == "<bos>[user]c"
        assert not any(task.done() for task in held)
        large.resume()
        assert await asyncio.gather(*held) == ["<bos>[user]b"] * 3

    run(TEMPLATE, test)


def test_a_conversation_past_its_deadline_is_refused_and_the_next_one_gets_its_own_answer():
    async def test(renderer):
        await render(renderer, "a")
        (child,) = children()
        child.suspend()
        with pytest.raises(DeadlineError):
            await render(renderer, "b", deadline_s=time.monotonic() + 0.05)
        child.resume()
        assert await render(renderer, "c") == "<bos>[user]c"

    run(TEMPLATE, test)


def test_closing_ends_a_conversation_under_way_and_its_process():
    async def test(renderer):
        await render(renderer, "a")
        (child,) = children()
        child.suspend()
        held = asyncio.create_task(render(renderer, "b"))
        await asyncio.sleep(0)
        await renderer.close()
        with pytest.raises((InvalidRequestError, UnavailableError)):
            await held
        assert not child.is_running()

    run(TEMPLATE, test)


def test_a_process_ends_when_its_parent_is_gone():
    async def test(renderer):
        await render(renderer, "a")
        (process,) = (each for each in renderer._processes if each._socket)
        process._socket.close()  # what the kernel does for a parent that died
        assert await asyncio.to_thread(process._child.wait, WAIT_S) == 0

    run(TEMPLATE, test)


def test_ctrl_c_at_the_terminal_does_not_reach_it():
    async def test(renderer):
        await render(renderer, "a")
        (child,) = children()
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
        assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL, "the limit is the child's own"

    run(TEMPLATE, test)
