"""Prompts before they become tokens."""

import html

from streamt2v.models.text import clean_prompt


def test_prompts_are_cleaned_before_they_become_tokens() -> None:
    assert clean_prompt("  A \u201csmart\u201d\n caf\u00e9 &amp;amp; bar ") == 'a "smart" caf\u00e9 & bar'
    assert clean_prompt(html.escape("<b>")) == "<b>"
    assert clean_prompt("&ldquo;\uff28\ufb01&rdquo;\x00") == '"hfi"'
