"""A Sphinx extension: what a page says of itself to search engines and to those who share it, and
folds that a screen reader reads by their own words."""

import html
import re

LONGEST = 200  # characters of a description


def description(body: str) -> str:
    """The first words of a page, its first paragraphs up to `LONGEST` characters, as plain text."""
    found = ""
    for paragraph in re.findall(r"<p>(.*?)</p>", body, re.DOTALL):
        words = html.unescape(re.sub(r"<[^>]+>", "", paragraph))
        if "\\(" not in words:  # an equation is no description
            found = f"{found} {' '.join(words.split())}".strip()
        if len(found) >= LONGEST:
            break
    return found if len(found) <= LONGEST else found[:LONGEST].rsplit(" ", 1)[0] + " …"


def finish(app, page: str, template: str, context: dict, doctree) -> None:
    """Add the meta tags of a page and mend its folds."""
    body = context.get("body")
    if not body:
        return
    # The label says "Toggle hidden content" of every fold, over the words that are seen.
    context["body"] = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    tags = {
        'name="description"': description(body),
        'property="og:title"': re.sub(r"<[^>]+>", "", context.get("title", "")),
        'property="og:description"': description(body),
        'property="og:type"': "article",
        'property="og:url"': f"{app.config.html_baseurl.rstrip('/')}/{page}.html",
    }
    context["metatags"] = context.get("metatags", "") + "".join(
        f'\n<meta {name} content="{html.escape(value)}" />' for name, value in tags.items() if value
    )


def setup(app):
    app.connect("html-page-context", finish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
