"""Markdown on the chat page: in pieces it is what it is at once, and it never becomes markup."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

SAMPLE = """# Title #
Text with **bold**, *italic*, ***both***, ~~gone~~, `code`, ``a ` b``, snake_case and 2 * 3 * 4.
Second line, \\*escaped\\*, **never closed

1. one
2. two with `code
   - nested
     more of it
   - nested **two**

   a paragraph within

7. ```js
let x = 1;
```

> quoted *text*
> > deeper
> - in a list

| a | b |
|---|:-:|
| 1 | **2** |
| lonely

***

[site](https://example.com/a_(b)?x=1 "title") and https://example.org/x_y. Then
~~~
unclosed **fence**
"""
HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(1)>
[a](javascript:alert(1)) [b](data:text/html,x) [c](vbscript:x) [d](//evil.example) [e](/admin)
![pixel](https://evil.example/p.png) [f](https://ok.example/"onmouseover="alert(1)) <https://g.example>
[javascript:alert(1)](https://label.example) java\tscript:alert(1) HTTPS://UPPER.example
```"><script>alert(1)</script>
<b>x</b>
```
| <i>t</i> | [x](file:///etc/passwd) |
|---|---|
| [h](https://user:pw@host.example) | <style>*{display:none}</style> |
"""
RENDER = """async (pieces) => {
  const { Markdown } = await import('/pages/markdown.js');
  const root = document.createElement('div');
  const markdown = new Markdown(root);
  for (const piece of pieces) markdown.write(piece);
  markdown.end();
  return root.innerHTML;
}"""


@pytest.fixture(scope="module")
def page(browser: Browser, shared_rig: Any) -> Iterator[Page]:
    """A page with the renderer, and no chat."""
    found = browser.new_page()
    found.goto(f"{shared_rig.url}/docs")
    yield found
    found.close()


@pytest.fixture
def render(page: Page) -> Callable[..., str]:
    return lambda *pieces: page.evaluate(RENDER, list(pieces))


@pytest.mark.parametrize("text", [SAMPLE, HOSTILE, SAMPLE.replace("\n", "\r\n")])
def test_a_text_in_pieces_is_the_text_at_once(render: Callable[..., str], text: str) -> None:
    whole = render(text)
    assert render(*text) == whole
    rng = random.Random(1)
    cuts = sorted(rng.sample(range(len(text)), 40))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert render(*pieces) == whole


def test_any_text_in_pieces_is_the_text_at_once(page: Page) -> None:
    alphabet = ["a", " ", "\n", "*", "**", "_", "`", "```\n", "- ", "1. ", "> ", "|", "|-|\n", "#"]
    alphabet += ["  ", "[x](", "https://a.b", ")", "~~", "\\", "\n\n", "    ", "\U0001f600"]
    rng = random.Random(2)
    texts = ["".join(rng.choices(alphabet, k=60)) for _ in range(200)]
    check = """async (texts) => {
      const render = %s;
      const wrong = [];
      for (const text of texts) {
        if (await render([text]) !== await render([...text])) wrong.push(text);
      }
      return wrong;
    }"""
    assert page.evaluate(check % RENDER, texts) == []


def test_markdown_is_drawn_as_models_mean_it(page: Page, render: Callable[..., str]) -> None:
    html = render(SAMPLE)
    for part in (
        "<h3>Title</h3>",
        "<strong>bold</strong>",
        "<em>italic</em>",
        "<strong><em>both</em></strong>",
        "<del>gone</del>",
        "<code>code</code>",
        "<code>a ` b</code>",
        "snake_case and 2 * 3 * 4.",
        "<br>Second line, *escaped*, **never closed",
        '<ol start="1"><li><span>one</span></li>',
        "<li><span>nested</span><span><br>more of it</span></li>",
        "<p><span>a paragraph within</span></p>",
        "<blockquote><p><span>quoted <em>text</em></span></p><blockquote>",
        "<tr><th>a</th><th>b</th></tr><tr><td>1</td><td><strong>2</strong></td></tr>",
        "<hr>",
        'href="https://example.com/a_(b)?x=1"',
        ">https://example.org/x_y</a>. Then",
        "unclosed **fence**\n</code>",
    ):
        assert part in html, part
    assert 'class="code-head"><span>js</span>' in html


def test_what_could_be_markup_stays_text(render: Callable[..., str]) -> None:
    """That nothing of it runs is held by test_page_hostile.py."""
    html = render(HOSTILE)
    for part in (
        "&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x",
        "[a](javascript:alert(1))",
        "&lt;i&gt;t&lt;/i&gt;",
        'href="https://evil.example/p.png"',  # an image is a link, and is not loaded
        'href="https://label.example/"',
    ):
        assert part in html, part


@pytest.mark.parametrize(
    "unit", ["word ", "line\n", "- item\n", "```\ncode\n```\n", "**", "`", "["]
)
def test_the_work_grows_with_the_length_and_no_faster(page: Page, unit: str) -> None:
    """What is drawn while a text streams, a few units at a time: twice the text, twice the work."""
    count = """async ([unit, times]) => {
      const { Markdown } = await import('/pages/markdown.js');
      const markdown = new Markdown(document.createElement('div'));
      let made = 0;
      const { append } = Element.prototype;
      Element.prototype.append = function (...nodes) {
        made += 1 + nodes.reduce((sum, node) => sum + (node.length ?? 1), 0);
        append.apply(this, nodes);
      };
      for (let i = 0; i < times; i += 1) markdown.write(unit.repeat(10));
      markdown.end();
      Element.prototype.append = append;
      return made;
    }"""
    once, twice = (page.evaluate(count, [unit, times]) for times in (400, 800))
    assert once >= 4000
    assert twice < 2.5 * once
