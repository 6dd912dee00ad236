"""Texts that somebody else may have written: paths that lead elsewhere, names that look like options, odd prompts."""

TRAVERSALS = [
    "..", "../x", "../../x", "a/../../x", "./../x", "a/..", "a/../..", "/etc/passwd", "//host/share", "/", "/tmp/x",
    "..\\x", "..\\..\\x", "a\\..\\..\\x", "C:\\x", "C:x", "c:/x", "\\x", "\\\\host\\share", "\\\\?\\C:\\x",
    "a/..\\../x",
    "a\0b", "\0", "../\0", "~/x", "~root/x", "$HOME/x", "%2e%2e/x", "..%2fx", "....//x", ".. /x", "CON", "con.mp4",
    "aux",
    "NUL.txt", "COM1", "x" * 300, "x.", "x. . .", " ", ".", "...", "-rf", "a\nb", "\u202e/x", "\uff0e\uff0e/x", "a:b",
]  # fmt: skip

NAMES = [
    "-x",
    "--output",
    "a:b",
    "%d",
    "new\nline",
    "a b'\";$()",
    "concat:x",
    "file:x",
    "\u202ex",
    "é",
    "@x",
    "{x}",
    "*",
]

PROMPTS = [
    "a red ball", "A RED BALL!", "a  red\tball", "line\nbreak", "\r\n", "-", "--model", "-h", "'", '"', "\\", "`id`",
    "$(id)", ";id", "|id", "&id", "%s%n", "%d", "{0}", "{{7*7}}", "${x}", "[/]", "[b]x", "[red]x[/red]", "[link=x]y",
    "<script>alert(1)</script>", "</title>", "<!--", "&amp;", "]]>", "\x1b[31mred", "\x1b]0;title\x07", "\x07",
    "\b\b", "\x7f",
    "\x9b31m", "\u202eevil", "\u2066x\u2069", "\u200b", "\ufeff", "e\u0301", "é", "\u0645\u0631\u062d\u0628\u0627",
    "日本語",
    "🎈", "👩‍👩‍👧‍👦", "\U0001f1e9\U0001f1ea", "Z\u0351\u036b\u0343", "\ufffd", "\uffff", "\U0010ffff", "1", "0",
    "true", "null",
    "prompts.24 = 'x'", '{"prompt": 1}', "a=b", "ball " * 10_000, "x" * 20_000, "a\u2028b",
]  # fmt: skip
NO_PROMPTS = [
    "",
    " ",
    "\n",
    "\t \n",
    "\u3000",
    "\0",
    "a\0b",
    "\ud800",
    "a\udcffb",
    "x" * 24_001,
    "🎈" * 2_001 + "x" * 24_000,
]

RECIPES = [
    "null", "[]", '"x"', "1", "{", '{"streamt2v": 1}', '{"streamt2v": "1", "config": []}',
    '{"streamt2v": "1", "config": {}}',
    '{"streamt2v": "1", "config": {"prompt": 3}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": ["a"]}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": "a", "evil": 1}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": "a", "num_frames": 1e999}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": "a", "num_frames": NaN}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": "a", "seed": ' + "9" * 5000 + '}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": "a", "prompts.-1": "b"}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": "a", "prompts.99999999": "b"}, "command": "generate"}',
    '{"streamt2v": "1", "config": {"prompt": "a"}, "command": "extend", "source": {"frames": -5}}',
    '{"streamt2v": "1", "config": {"prompt": "a"}, "command": "extend", "source": {"frames": "x"}}',
    '{"streamt2v": "1", "config": {"prompt": "a"}, "command": "extend", "source": 3}',
    '{"streamt2v": "1", "config": {"prompt": "a", "stream.chunk": 1, "stream.overlap": 0, "num_frames": 10000000}}',
    '{"streamt2v": "1", "config": ' + '{"a":' * 400 + "1" + "}" * 401,
    '{"streamt2v": "1", "config": {}, "x": ' + "[" * 900 + "]" * 900 + "}",
    "[" * 20_000,
]  # fmt: skip
