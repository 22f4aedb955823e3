"""Pictures as large as their letters need, and panels below one another on a narrow page.

Side by side on a phone, two panels have letters too small to read. So such a picture is in the
page as a whole and once more panel by panel, each a window on the same file (no byte more is
loaded); the style sheet shows the one or the others. Such pictures have the class "panels", from
their cell's metadata; where the panels are is found in the picture: what parts them is empty from
top to bottom.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image

GUTTER = 4          # pixels between two panels, at least
SHOWN = 0.75        # of a stored pixel: letters of ten points are 15.6 pixels high in the page
OFF = 0.05          # of the width: as far may a gutter be from where equal panels would part
PANELS = (2, 3)
PICTURE = re.compile(r'<img (?=[^>]*class="[^"]*\bpanels\b)(?=[^>]*alt="(?P<alt>[^"]*)")'
                     r'[^>]*src="(?P<src>[^"]+)"[^>]*>')
WINDOW = ('<img data-panels="one" loading="lazy" alt="{alt}" src="{src}" style="aspect-ratio: '
          '{width} / {height}; object-position: {position:.2f}% 0" />')


def panels(picture: Image.Image) -> list[tuple[int, int]]:
    """The first and the last column of each panel of a picture, which are about equally wide, on a
    ground of the first corner's colour; [] where none are found."""
    pixels, width = np.asarray(picture.convert("RGBA")), picture.width
    seen = (pixels != pixels[0, 0]).any(axis=(0, 2))
    edges = np.flatnonzero(np.diff(np.concatenate([[True], seen, [True]]).astype(int)))
    gaps = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2]) if b - a >= GUTTER]
    for count in PANELS:
        near = [[gap for gap in gaps if abs(sum(gap) / 2 / width - k / count) < OFF]
                for k in range(1, count)]
        if all(near):
            cuts = [sum(some[0]) // 2 for some in near]      # a label of the next may follow
            return [*zip([0, *cuts], [*cuts, width])]
    return []


def sized(body: str, files: dict[str, Path]) -> str:
    """A page's HTML, with pictures of pixels at their size, all in one scale. `files` says where
    the picture of a name is."""
    def at_its_size(match: re.Match) -> str:
        name = Path(match["src"]).name
        if name not in files or not name.endswith(".png"):
            return match[0]
        with Image.open(files[name]) as picture:
            return match[0].replace("<img ", f'<img width="{SHOWN * picture.width:.0f}" ', 1)
    return re.sub(r'<img (?![^>]*width=)[^>]*src="(?P<src>[^"]+)"[^>]*>', at_its_size, body)


def stacked(body: str, files: dict[str, Path]) -> str:
    """A page's HTML, with pictures of the class also panel by panel. `files` says where the picture
    of a name is. Raises ValueError if one of them has no panels."""
    def also(match: re.Match) -> str:
        name = Path(match["src"]).name
        with Image.open(files[name]) as picture:
            found, (width, height) = panels(picture), picture.size
        if not found:
            raise ValueError(f"no panels are found in {name}: {match[0]}")
        windows = [WINDOW.format(alt=match["alt"] if first == 0 else "", src=match["src"],
                                 width=last - first, height=height,
                                 position=100 * first / (width - (last - first)))
                   for first, last in found]
        return match[0].replace("<img ", '<img data-panels="whole" ', 1) + "".join(windows)
    return PICTURE.sub(also, body)
