"""The house: which files there are, and which of them may import which."""

import ast
import subprocess
from pathlib import Path

PROJECT = Path(__file__).parent.parent
FIVE = {"train", "rollout", "select", "quant", "reward"}
BESIDE = {"README.md", "requirements.txt", "LICENSE", "tests", "docs", "support", "experiments"}


def graph():
    """{name of a module: the project's modules that it imports, wherever in the file}."""
    files = [
        p for folder in ("", "support", "experiments") for p in (PROJECT / folder).glob("*.py")
    ]
    names = {".".join(p.relative_to(PROJECT).with_suffix("").parts): p for p in files}
    arrows = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and node.value == "select.py":
                found.add("select")  # which is loaded by its path
        arrows[name] = found & names.keys() - {name}
    return arrows


def test_the_top_level_is_the_five_files_and_nothing_else():
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in listed} or {p.name for p in PROJECT.iterdir()}
    python = {name for name in top if name.endswith(".py")}
    assert python == {f"{name}.py" for name in FIVE}
    assert {name for name in top - python if not name.startswith(".")} <= BESIDE


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

    def follow(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in arrows[name]:
            follow(other, [*path, name])

    for name in arrows:
        follow(name, [])
