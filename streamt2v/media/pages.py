"""HTML pages of one design: every text escaped, pictures embedded, nothing fetched from elsewhere.

A page is one column on a phone and follows the reader's choice of light or dark. The policy in it allows its own style
by hash, pictures inside the page and, on the page of `watch` only, its script by nonce and what its server sends.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from streamt2v import __version__
from streamt2v.chunks import evenly
from streamt2v.media import pictures

if TYPE_CHECKING:
    from streamt2v.media.frames import Frames

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style></head>
<body><h1 id="title">{{ title }}</h1>
{% block body %}{% endblock %}
<footer>streamt2v {{ version }}</footer></body>
</html>
"""
_PARTS = """
{% macro sheet(shown) %}
<div class="sheet{{ " few" if shown|length % 6 }}">
{% for still in shown %}
<figure><img alt="frame {{ still.frame }}" src="{{ still.picture }}"><figcaption>{{ still.time }}
<span class="soft">#{{ still.frame }}</span></figcaption></figure>
{% endfor %}
</div>
{% endmacro %}
{% macro moving(picture) %}
{% if picture %}<img class="moving" alt="moving preview" src="{{ picture }}">
{% endif %}
{% endmacro %}
{% macro prompts(turns, fps) %}
{% if turns %}<h2>Prompts</h2>
<table><tr><th class="text tight">from</th><th class="tight">frame</th><th class="text">prompt</th></tr>
{% for turn in turns %}
<tr data-frame="{{ turn.frame }}"><td class="text tight">{{ timecode(turn.frame, fps) }}</td>
<td class="tight">{{ turn.frame }}</td>
<td class="text">{{ turn.text }}
{% if turn.asked != turn.frame %}<span class="soft">(asked for at {{ turn.asked }})</span>{% endif %}</td></tr>
{% endfor %}
</table>
{% endif %}
{% endmacro %}
{% macro command(line, title="Make it again") %}
{% if line %}<h2>{{ title }}</h2>
<pre>{% for word in line.split(" ") %}{{ " " if loop.index0 }}
{%- if word[:2] == "--" %}<span class="tight">{{ word }}</span>
{%- else %}{{ word }}{% endif %}{% endfor %}</pre>
{% endif %}
{% endmacro %}
{% macro settings(groups, title) %}
{% if groups %}<h2>{{ title }}</h2>
<div class="groups">
{% for name, rows in groups.items() %}
<section>{% if name %}<h3>{{ name }}</h3>{% endif %}
<dl>{% for key, value in rows.items() %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></section>
{% endfor %}
</div>
{% endif %}
{% endmacro %}
"""
_IMPORTS = "{% from 'parts' import sheet, moving, prompts, command, settings with context %}"
LIVE = "; media-src 'self' blob:; connect-src 'self'; script-src 'nonce-{}'"
MOVING_FRAMES, MOVING_WIDTH = 48, 256


def render(title: str, body: str, nonce: str = "", **values: Any) -> str:
    """Return a page with a title and a body, a jinja2 template that is filled with `values`, all of them escaped.

    Args:
        title: also the first heading.
        body: a template; it may use the macros sheet, moving, prompts, command and settings, and timecode.
        nonce: that of a page with a script, which a server of its own sends; empty for a page that is a file.
        values: what the template names.
    """
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    images = "'self' data:" if nonce else "data:"
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src {images}; style-src 'sha256-{digest}'"
    whole = f"{{% extends 'page' %}}{{% block body %}}{_IMPORTS}{body}{{% endblock %}}"
    templates = DictLoader({"page": _PAGE, "parts": _PARTS, "body": whole})
    environment = Environment(autoescape=True, loader=templates, undefined=StrictUndefined, trim_blocks=True)
    environment.globals["timecode"] = timecode
    policy += LIVE.format(nonce) if nonce else ""
    page = {"title": title, "version": __version__, "policy": Markup(policy), "style": Markup(style), "nonce": nonce}
    return environment.get_template("body").render(**page, **values)


def timecode(frame: float, fps: float | Fraction) -> str:
    """Return the time at which a frame is shown, as minutes:seconds."""
    minutes, tenths = divmod(round(10 * frame / fps), 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{minutes:02}:{tenths / 10:04.1f}"
    return f"{hours}:{rest}" if hours else rest.removeprefix("0")


class Still(NamedTuple):
    """A picture of a contact sheet: its frame, its time, and itself as a data URL."""

    frame: int
    time: str
    picture: str


def sheet(images: Sequence[Frames] | Frames, numbers: Sequence[int], fps: float | Fraction) -> list[Still]:
    """Return small frames [h,w,3] as a contact sheet; so many, evenly spaced, that rows of six or of two are full.

    Args:
        images: small frames of a video in order.
        numbers: which frame of the video each of them is.
        fps: its rate.
    """
    full = evenly(len(images), len(images) - len(images) % 6 if len(images) > 6 else len(images))
    return [Still(numbers[at], timecode(numbers[at], fps), picture(images[at])) for at in full]


def moving(images: Frames, fps: float | Fraction) -> str:
    """Return small frames [F,h,w,3] as an endless animation, a data URL; empty for a single frame."""
    if len(images) < 2:
        return ""
    data = pictures.encode_animation(np.asarray(images), Fraction(fps).limit_denominator(1000), "WEBP")
    return _url("webp", data)


def picture(image: Frames) -> str:
    """Return a uint8 picture [H,W,3] as a data URL."""
    return _url("jpeg", pictures.encode_image(image, "JPEG"))


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
