"""experiments/walkthrough.py: it makes every picture and every caption of its page."""

import re

from conftest import PROJECT

from experiments import walkthrough

PAGE = PROJECT / "docs" / "walkthrough.md"


def without_captions(page):
    return re.sub(r"(<!-- (\w+) -->\n).*?(?=<!-- end of \2 -->)", r"\1", page, flags=re.DOTALL)


def test_the_page_has_all_captions_and_pictures_and_else_stays_as_it_is(tmp_path, monkeypatch):
    page = tmp_path / "walkthrough.md"
    page.write_text(without_captions(PAGE.read_text()))
    monkeypatch.setattr(walkthrough, "PAGE", page)
    monkeypatch.setattr(walkthrough, "UPDATES", 2)
    walkthrough.main()
    text = page.read_text()
    assert without_captions(text) == without_captions(PAGE.read_text())
    assert not re.search(r"-->\n<!-- end of", text), "a section without a caption"
    assert not re.search(r"\bnan\b", text)
    contrasts = re.search(r"are (\d\.\d\d) apart, .* random ones (\d\.\d\d)\.", text).groups()
    of_kept, of_random = map(float, contrasts)
    assert of_kept > of_random > 0
    pictures = re.findall(r"\]\((walkthrough/\w+\.png)\)", text)
    assert pictures and all((tmp_path / picture).exists() for picture in pictures)
