"""The reader of code blocks reads what a page shows, and no page has a block that nobody could run."""

from __future__ import annotations

import pages
import pytest

PAGE = """# Title

```sh
# no heading
one
```

## A

a

```python
x = 1
```

### B

```python
x = 2
```

## C

```
bare
```

``` not a fence
## D
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    return "page.md"


def test_blocks_are_found_by_language_and_heading(page):
    assert pages.blocks(page, None, "python") == ["x = 1\n", "x = 2\n"]
    assert pages.blocks(page, None, "sh") == ["# no heading\none\n"]
    assert pages.blocks(page, "A", "python") == ["x = 1\n", "x = 2\n"]
    assert pages.blocks(page, "### B", "python") == ["x = 2\n"]
    assert pages.blocks(page, "C", "python") == []
    assert pages.languages(page) == ["sh", "python", "python", ""]
    assert pages.languages(page, "C") == [""]


def test_a_section_ends_where_one_of_its_level_or_above_begins(page):
    assert pages.section(page, "B").strip() == "```python\nx = 2\n```"
    assert "## C" not in pages.section(page, "## A")
    assert pages.section(page, "# Title").endswith("## D\n")


def test_headings_that_are_not_there_once_are_refused(page):
    for heading in ("E", "no heading", "## B"):
        with pytest.raises(ValueError, match="which it has 0 times"):
            pages.blocks(page, heading, "python")


# Section of docs/integrations.md -> the languages of its blocks, each of which the named file runs.
RUN = {
    "## vLLM": (["sh", "python"], "test_vllm_server.py"),
    "## SGLang": (["python"], "test_sglang_queries.py"),
    "## Transformers": (["python"], "test_transformers_calls.py"),
    "## kvpress": (["python", "python"], "test_kvpress_page.py"),
    "## C and C++": (["sh", "cmake", "c", "sh"], "test_c_package.py"),
    "## Hugging Face kernels": (["sh", "python"], "test_hf_kernel.py"),
}


def test_every_block_of_the_integrations_is_one_that_a_test_runs():
    page = "docs/integrations.md"
    for heading, (languages, file) in RUN.items():
        assert pages.languages(page, heading) == languages, f"{heading}: a new block wants a test in {file}"
        text = (pages.ROOT / "python_tests" / file).read_text(encoding="utf-8")
        assert heading.removeprefix("## ") in text
        assert "blocks(" in text
    assert pages.languages(page) == [one for languages, _ in RUN.values() for one in languages]  # none outside of them


@pytest.mark.parametrize("name", ["README.md", "docs/integrations.md", "docs/quality.md", "docs/sparse-attention.md"])
def test_every_fence_of_a_page_belongs_to_a_block(name):
    fences = [line for line in pages.text_of(name).splitlines() if line.startswith("```")]
    assert len(fences) == 2 * len(pages.languages(name))
    assert all(pages.languages(name))
