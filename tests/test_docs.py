"""The README and docs/: paths, anchors and line numbers exist, and Python blocks compile.

python tests/test_docs.py    # after a change of code: writes the README's line numbers again
"""

import ast
import dataclasses
import re
import shlex
import textwrap
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md"))]
LINES = re.compile(r"(\[(\w+\.py)\]\(\2\) \| )(\d+)")  # of the table of files
# Of the table of symbols.
PLACE = re.compile(r"((?:`\w+`(?:, )?)+) \| ((?:\[\w+\.py:\d+\]\(\S+\)(?:, )?)+) \|")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


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
        names, files = re.findall(r"`(\w+)`", match[1]), re.findall(r"\[(\w+\.py):", match[2])
        places = [(file, first_line(file, name)) for name, file in zip(names, files, strict=True)]
        return f"{match[1]} | {', '.join(f'[{f}:{n}]({f}#L{n})' for f, n in places)} |"

    return PLACE.sub(place, LINES.sub(count, text))


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_its_line_numbers_are_right():
    text = README.read_text()
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 2000
    assert len(LINES.findall(text)) == 5 and len(PLACE.findall(text)) == 11
    assert text == with_right_numbers(text), "run python tests/test_docs.py"


@every_page
def test_links_and_paths_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or path.endswith(".py") or anchor in anchors(linked), target
    for path in re.findall(r"\b(?:support|experiments|tests|docs)/[\w./]*\w", page.read_text()):
        assert (PROJECT / path).exists(), path


@every_page
def test_python_blocks_compile(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        # As the body of a function, because an excerpt may return.
        compile("def block():\n" + textwrap.indent(code, "    "), page.name, "exec")


@every_page
def test_commands_of_train_can_be_parsed(page):
    """Of a run to resume, of --help and of the exercises, which add names, the options exist."""
    import train

    names = {"help", *(field.name for field in dataclasses.fields(train.Config) if field.init)}
    for line in re.findall(r"(train\.py --[^#`\n]*)", page.read_text()):
        assert set(re.findall(r"--([\w-]+)", line)) <= names, line
        if page.name != "exercises.md" and not re.search("--(help|resume)", line):
            train.parse_options(shlex.split(line)[1:])


if __name__ == "__main__":
    README.write_text(with_right_numbers(README.read_text()))
