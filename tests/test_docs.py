"""The README and docs/: paths, anchors and line numbers exist, and Python blocks compile.

python tests/test_docs.py    # after a change of code: writes the README's line numbers again
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md"))]
LINES = re.compile(r"(\[(\w+\.py)\]\(\2\) \| )(\d+)")  # of the table of files
PLACE = re.compile(
    r"((?:`\w+`(?:, )?)+) \| ((?:\[\w+\.py:\d+\]\(\S+\)(?:, )?)+) \|"
)  # of the table of symbols


def first_line(file, name):
    """The line on which a top-level function, class or constant of a file begins."""
    for node in ast.parse((PROJECT / file).read_text()).body:
        targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if name in (getattr(node, "name", None), *targets):
            return node.lineno
    raise AssertionError(f"{file} has no {name}")


def with_right_numbers(text):
    """The README with the numbers of lines, and those of functions, as they are now."""

    def count(match):
        return match[1] + str(len((PROJECT / match[2]).read_text().splitlines()))

    def place(match):
        names = re.findall(r"`(\w+)`", match[1])
        files = re.findall(r"\[(\w+\.py):\d+\]", match[2])
        assert len(names) == len(files), match[0]
        places = [(file, first_line(file, name)) for name, file in zip(names, files)]
        links = [f"[{file}:{line}]({file}#L{line})" for file, line in places]
        return f"{match[1]} | {', '.join(links)} |"

    return PLACE.sub(place, LINES.sub(count, text))


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )


def test_the_readme_is_short_and_its_line_numbers_are_right():
    text = README.read_text()
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 2000
    assert len(LINES.findall(text)) == 5 and len(PLACE.findall(text)) == 11
    assert text == with_right_numbers(text), "run python tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or path.endswith(".py") or anchor in anchors(linked), target
    for path in re.findall(r"\b(?:support|experiments|tests|docs)/[\w./]*\w", page.read_text()):
        assert (PROJECT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for code in code_blocks(page, "python"):
        # As the body of a function, because an excerpt may return.
        compile("def block():\n" + textwrap.indent(code, "    "), page.name, "exec")


def test_each_excerpt_is_a_copy_of_lines_of_the_function_that_it_names():
    blocks = code_blocks(PROJECT / "docs" / "walkthrough.md", "python")
    assert blocks
    for block in blocks:
        head, _, excerpt = block.partition("\n")
        file, function = re.fullmatch(r"# (\w+\.py), (\w+)", head).groups()
        source = (PROJECT / file).read_text()
        (node,) = [n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") == function]
        lines, n = source.splitlines()[node.lineno - 1 : node.end_lineno], excerpt.count("\n")
        parts = [textwrap.dedent("\n".join(lines[i : i + n])) for i in range(len(lines))]
        assert excerpt.rstrip() in parts, f"not in {file}, {function}:\n{excerpt}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_train_name_options_that_exist(page):
    import train
    from support.options import OPTIONS

    names = {"help", *OPTIONS, *(f"no-{name}" for name in OPTIONS)}
    for line in re.findall(r"(train\.py --[^#`\n]*)", page.read_text()):
        for option in re.findall(r"--([\w-]+)", line):
            assert option in names, line
        for algorithm in re.findall(r"--algorithm (\w+)", line):
            # The reader adds those of the exercises, which tests/test_exercises.py runs.
            assert algorithm in train.ALGORITHMS or page.name == "exercises.md", line


if __name__ == "__main__":
    README.write_text(with_right_numbers(README.read_text()))
