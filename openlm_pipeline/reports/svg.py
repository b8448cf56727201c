"""A matplotlib figure as a piece of inline SVG that takes its colours from the page around it.

The same figure gives the same bytes: no dates, no random ids, no settings of the user's `matplotlibrc`.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Stand-ins to draw with; the page's CSS decides what they look like, in light and in dark."""

_PAGE_COLOUR = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "openlm",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.unicode_minus": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Figures made inside have this project's look, whatever the user's matplotlib settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """`figure` as an `<svg>` element for an HTML page; call it inside `drawing_style`.

    `name` keeps its ids apart from those of other figures on the page; `description` is read to those who cannot see
    it. Text stays text. XML namespaces, metadata, comments and page-wide style rules are left out.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    referenced = {v for e in root.iter() for a in e.attrib.values() for v in re.findall(r"#(\w+)", a)}
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            key: value
            for key, value in ((_local(k), _restyle(v, name)) for k, v in element.attrib.items())
            if key != "id" or value in referenced
        }
        if "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"
        element.tail = None
        if element.tag != "text":
            element.text = None
    title = ElementTree.Element("title")
    title.text = description
    root.insert(0, title)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _local(qualified: str) -> str:
    return qualified.rpartition("}")[2]


def _restyle(value: str, name: str) -> str:
    """One attribute: page colours for stand-ins, references to ids under the figure's name."""
    for colour, on_page in _PAGE_COLOUR.items():
        value = value.replace(colour, on_page)
    value = re.sub(r"url\(#(\w+)\)", rf"url(#{name}-\1)", value)
    return re.sub(r"^#(\w+)$", rf"#{name}-\1", value)
