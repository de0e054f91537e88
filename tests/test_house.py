"""The house: which files there are, and which of them may import which.

python tests/test_house.py    # prints who imports whom
"""

import ast
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
FIVE = {"train", "rollout", "select", "quant", "reward"}
BESIDE = {"README.md", "requirements.txt", "LICENSE", "tests", "docs", "support", "experiments"}


def modules():
    """{name of a module: its file}, of the project without its tests."""
    files = [
        p for folder in ("", "support", "experiments") for p in (PROJECT / folder).glob("*.py")
    ]
    return {".".join(p.relative_to(PROJECT).with_suffix("").parts): p for p in files}


def imports(path, names):
    """The project's modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and node.value == "select.py":
            found.add("select")  # which is loaded by its path
    return found & names.keys() - {"support.__init__"}


def graph():
    names = modules()
    return {name: imports(path, names) - {name} for name, path in names.items()}


def test_the_top_level_is_the_five_files_and_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.split()
    top = {name.split("/")[0] for name in listed} or {p.name for p in PROJECT.iterdir()}
    python = {name for name in top if name.endswith(".py")}
    assert python == {f"{name}.py" for name in FIVE}
    assert {name for name in top - python if not name.startswith(".")} <= BESIDE


def test_arrows_go_one_way():
    """experiments -> train -> rollout, reward, select, quant -> support."""
    for name, imported in graph().items():
        if not name.startswith("experiments"):
            assert not any(other.startswith("experiments") for other in imported), name
        if name.startswith("support"):
            assert not imported & FIVE, name
        elif name not in ("train", "rollout") and name in FIVE:
            assert not imported & FIVE, name
        elif name == "rollout":
            assert imported & FIVE == {"quant"}
        if name not in ("train", "support.options"):
            assert "support.options" not in imported, f"{name} knows the options"


def test_nothing_imports_itself_by_a_detour():
    arrows = graph()

    def follow(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in arrows[name]:
            follow(other, [*path, name])

    for name in arrows:
        follow(name, [])


def test_help_and_wrong_options_do_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', sys.argv[1]]\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(PROJECT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code or 0, sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))\n"
    )
    for option, expected in (("--help", "0 []"), ("--stepz", "2 []")):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == expected, done.stderr
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1


if __name__ == "__main__":
    for name, imported in sorted(graph().items()):
        print(f"{name:28} -> {', '.join(sorted(imported)) or '(nothing)'}")
