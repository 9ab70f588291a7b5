"""Nothing that comes over the network, and no file, is run as code or unpickled."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("core", "client", "router_service", "prefill_service", "decode_service", "planner", "kernels")
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}
EXCEPT = {
    "core/headrace_core/roofline/formula.py": {"eval", "compile"},
    "core/headrace_core/testing/rank_processes.py": {"pickle"},
}
"""Formulas are constants of the package: the report prints them, and Python computes with them. Tests give arguments to
processes of their own."""


def found_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (name.name.split(".")[0] for name in names if name.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            # numpy's and torch's own ways to unpickle a file.
            case ast.Call(func=ast.Attribute(value=ast.Name(id=("torch" | "np" | "numpy") as module), attr="load")):
                yield f"{module}.load"
            case ast.keyword(arg="allow_pickle" | "shell", value=ast.Constant(value=True)):
                yield node.arg


def test_nothing_is_unpickled_and_no_text_is_run():
    found = {}
    for path in sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if names := set(found_in(path)) - EXCEPT.get(name, set()):
            found[name] = names
    assert not found


def test_the_walk_finds_what_it_looks_for(tmp_path):
    path = tmp_path / "bad.py"
    for line, name in {
        "import pickle": "pickle",
        "from yaml import load": "yaml",
        "eval('1')": "eval",
        "torch.load(path)": "torch.load",
        "numpy.load(path, allow_pickle=True)": "allow_pickle",
        "run(command, shell=True)": "shell",
    }.items():
        path.write_text(line)
        assert name in set(found_in(path))
