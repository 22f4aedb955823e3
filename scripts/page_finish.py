"""A Sphinx extension: what a page says of itself to search engines and to those who share it, folds
that a screen reader reads by their own words, panels below one another on a phone, and nothing that
no page uses: Thebe, sphinx-design, icons as scripts beside the same icons as a font, MathJax's
menus and readers of other markup."""

import html
import re
from pathlib import Path

from page_pictures import sized, stacked

LONGEST = 200  # characters of a description
UNUSED = ("thebe", "sphinx-design", "design-tabs")
MATHJAX = {"loader": {"load": ["input/tex", "output/chtml", "a11y/assistive-mml"]},
           "options": {"enableMenu": False}}   # and so a formula is no stop of the tab key


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
    """Add the meta tags of a page, mend its folds, leave out what no page uses."""
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, ())
                         if not any(name in _told(file) for name in UNUSED)]
    body = context.get("body")
    if not body:
        return
    # The label says "Toggle hidden content" of every fold, over the words that are seen.
    body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    body = body.replace('<a class="headerlink"', '<a tabindex="-1" class="headerlink"')
    body = re.sub(r"<img (?![^>]*loading=)", '<img loading="lazy" ', body)
    files = {name: Path(app.srcdir, path) for path, name in app.builder.images.items()}
    body = stacked(sized(body, files), files)
    body = re.sub(r'<script type="text/x-thebe-config">.*?</script>', "", body, flags=re.DOTALL)
    context["body"] = re.sub(r"<script>kernelName = .*?</script>", "", body)
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


def _told(file) -> str:
    """The name of a page's file and what else is known of it, in lower case."""
    return f"{getattr(file, 'filename', file)} {getattr(file, 'attributes', '')}".lower()


def lighten(app, config) -> None:
    """Load of MathJax what the pages need. Its package has set the path to all of it."""
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = MATHJAX | (config.mathjax3_config or {})


def without_icon_scripts(app, error) -> None:
    """Empty the script that draws icons: the theme's style sheet has them as a font, too."""
    script = Path(app.outdir, "_static", "scripts", "fontawesome.js")
    if not error and script.exists():
        script.write_text("")


def setup(app):
    app.connect("config-inited", lighten, priority=100)     # before MyST adds to the settings
    app.connect("build-finished", without_icon_scripts)
    app.connect("html-page-context", finish, priority=900)  # after the theme and what it brings
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
