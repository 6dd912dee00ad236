"""Self-contained HTML pages: every text escaped, pictures embedded, nothing fetched, no scripts."""

import base64
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from streamt2v import __version__
from streamt2v.media import pictures
from streamt2v.media.frames import Frames

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1000px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
td, th { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
td:first-child, th:first-child, td.text { text-align: left; overflow-wrap: anywhere }
svg, img { display: block; max-width: 100%; margin: 4px 0 }
svg text { font: 11px system-ui, sans-serif; fill: #555 }
</style>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
<p>streamt2v {{ version }}</p>
</html>
"""


def render(title: str, body: str, **values: Any) -> str:
    """Return a page with a title and a body, a jinja2 template that is filled with `values`, all of them escaped."""
    templates = DictLoader({"page": _PAGE, "body": f"{{% extends 'page' %}}{{% block body %}}{body}{{% endblock %}}"})
    environment = Environment(autoescape=True, loader=templates, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("body").render(title=title, version=__version__, **values)


def picture(image: Frames) -> str:
    """Return a uint8 picture [H,W,3] as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(pictures.encode_image(image, 'JPEG')).decode()}"
