"""The Python snippets of docs/client.md run, against a scripted router."""

import re
from pathlib import Path

import pytest
from headrace_core.testing.fake_router import FakeRouter

SNIPPETS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/client.md").read_text(), re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_page_runs(snippet):
    with FakeRouter() as router:
        code = snippet.replace("127.0.0.1:50050", router.address)
        exec(compile(code, "docs/client.md", "exec"), {"__name__": "snippet"})
    assert router.requests
