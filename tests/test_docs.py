"""Every Python block of the README and of docs/ runs: the blocks of one file in order, in one namespace."""

import re
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(?P<indent> *)```python *\n(?P<code>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL)
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if page.exists() and BLOCK.search(page.read_text())
}


def run(text: str, name: str) -> None:
    """Run the blocks of `text`; a traceback shows the page's own line numbers."""
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, block.start("code"))
        code = "\n" * lines_before + textwrap.dedent(block["code"])
        exec(compile(code, name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        run(PAGES[page].read_text(), page)
    finally:
        plt.close("all")


PAGE = """\
```python
a = 1
```

```sh
false
```

- item
  ```python
  if a:
      raise RuntimeError(a)
  ```
"""


def test_the_blocks_share_a_namespace_and_keep_their_lines():
    with pytest.raises(RuntimeError, match="1") as error:
        run(PAGE, "page.md")
    assert error.traceback[-1].lineno + 1 == 1 + PAGE[: PAGE.index("raise")].count("\n")
