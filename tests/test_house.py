"""Which files there are at the top level, and which of them may import which."""

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
FOLDERS = "", "support", "experiments"
FIVE = {"train", "rollout", "select", "quant", "reward"}
BESIDE = {"README.md", "requirements.txt", "LICENSE", "tests", "docs", "support", "experiments"}


def graph():
    """{name of a module: the project's modules that it imports, wherever in the file}."""
    paths = [p.relative_to(PROJECT) for d in FOLDERS for p in (PROJECT / d).glob("*.py")]
    names, arrows = {".".join(p.with_suffix("").parts): p for p in paths}, {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse((PROJECT / path).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and node.value == "select.py":
                found.add("select")  # which is loaded by its path
        arrows[name] = found & names.keys() - {name}
    return arrows


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="git lists the project's files")
def test_the_top_level_is_the_five_files_and_nothing_else():
    listed = subprocess.check_output(["git", "ls-files"], cwd=PROJECT, text=True).split()
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    assert top == {f"{name}.py" for name in FIVE} | BESIDE


def test_arrows_go_one_way_and_in_no_circle():
    """experiments -> train -> rollout, reward, select, quant -> support."""
    arrows = graph()
    assert arrows["train"] & FIVE == FIVE - {"train"} and arrows["rollout"] & FIVE == {"quant"}
    for name, imported in arrows.items():
        if not name.startswith("experiments"):
            assert not any(other.startswith("experiments") for other in imported), name
        if name.startswith("support") or name in ("select", "quant", "reward"):
            assert not imported & FIVE, name
        assert name == "train" or "support.options" not in imported, f"{name} knows the options"
    tuple(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError for a circle
