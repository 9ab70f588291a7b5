"""The table of reasons is what the code raises, and what the docs say."""

import ast
import re
from pathlib import Path

from headrace_core.reasons import REASONS, table

ROOT = Path(__file__).parents[2]
PRODUCT = ["core", "prefill_service", "decode_service", "router_service", "client", "planner"]
ERRORS = {error.__name__: error for error in REASONS}
KNOWN = {reason for reasons in REASONS.values() for reason in reasons}


def _sources():
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).glob("headrace_*/**/*.py")):
            if "testing" not in path.as_posix():
                yield path, ast.parse(path.read_text())


def raised():
    """Yield (error class's name, reason, place) of every error that product code makes with a literal reason."""
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                reason = node.args[0]
                if isinstance(reason, ast.Constant):
                    yield node.func.id, reason.value, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_reason_that_is_raised_is_in_the_table():
    unknown = [f"{place}: {name} {reason}" for name, reason, place in raised() if reason not in REASONS[ERRORS[name]]]
    assert not unknown, "add them to headrace_core/reasons.py"


def test_every_reason_in_the_table_is_raised():
    made = {(name, reason) for name, reason, _ in raised()}
    listed = {(error.__name__, reason) for error, reasons in REASONS.items() for reason in reasons}
    assert sorted(listed - made) == [], "delete them from headrace_core/reasons.py"


def test_the_page_of_errors_is_the_table():
    page = (ROOT / "docs/errors.md").read_text()
    assert page[page.index("| error |") :] == table(), "python -m headrace_core.reasons writes it"


def test_protos_and_docs_name_only_reasons_that_exist():
    unknown = []
    for path in sorted((ROOT / "protos/headrace").glob("**/*.proto")):
        comments = " ".join(re.findall(r"//(.*)", path.read_text()))
        for status, reasons in re.findall(
            r"\b([A-Z]+(?:_[A-Z]+)+|UNAVAILABLE|INTERNAL|ABORTED) \(([A-Z_, ]+)\)", comments
        ):
            unknown += [
                f"{path.name}: {status} {name}" for name in re.findall(r"[A-Z_]+", reasons) if name not in KNOWN
            ]
    for path in sorted((ROOT / "docs").glob("*.md")):
        for status, name in re.findall(r"`([A-Z_]+) ([A-Z_]+)`", path.read_text()):
            unknown += [f"{path.name}: {status} {name}"] if name not in KNOWN else []
    assert not unknown, unknown
