# ruff: noqa: E501, RUF001
"""Texts as the web has them: many scripts, emoji, code, markup, addresses, marks, control characters."""

from __future__ import annotations

import random

PIECES = (
    "The quick brown fox", "naïve café, Straße, smørrebrød", "Ελληνικά και πολυτονικά ᾿Αθῆναι", "Съешь ещё этих булок",
    "שָׁלוֹם עולם", "مرحبا بالعالم \u200fو\u200e", "\u202eright to left\u202c", "नमस्ते दुनिया क्षत्रिय", "สวัสดีชาวโลก", "ខ្មែរ", "தமிழ்",
    "你好，世界！", "こんにちは、世界。ｶﾀｶﾅ", "안녕하세요", "안녕", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀",
    "👩‍👩‍👧‍👦👍🏽🏳️‍🌈🇪🇺", "☃️ ™ ½ ﬁ Ⅷ ㎏", "e\u0301 a\u0308\u0323 Z̷̢̛a̶l̵g̶o̷", "def f(x: int) -> int:\n\treturn x ** 2  # ok\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }", "<p class=\"a\">x &amp; y<br/></p><!-- c -->", "{{ not a template }} {% raw %}",
    "https://example.com/a/b?q=%C3%A9&x=" + "0123456789abcdef" * 12 + "#top", "user@example.org", "C:\\Users\\x\\n",
    '{"a": [1, 2.5e-3, null], "b": "\\u00e9"}', "a\tb\r\nc\rd\n\n\ne", "\x00\x01\x07\x1b[31m\x7f\x85", "\u2028\u2029\u200b\ufeff\u00a0\u3000",
    "\ufffe\uffff\ue000\U0010ffff\ufffd", "<|user|> <|end|> <|bos|> <|pad|>", "ſİıßẞŉǰ", "supercalifragilistic" * 8, "1234567890" * 5,
    "$1,234.56 + 10% = €1’358,02", "    ", "\n\n\n", "\\n \\u0041 \\", "'\"`´‘’“”«»", "a,b;c|d", "NULL None nan",
)  # fmt: skip
"""No letter of any is lost in JSON or Parquet; U+2028 and the like end no line."""


def multilingual(count: int, seed: int = 0) -> list[str]:
    """`count` texts of up to a dozen pieces, some of them empty, some shuffled letter by letter."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        text = rng.choice(("", " ", ", ", "\n")).join(rng.choices(PIECES, k=rng.randrange(13)))
        if rng.random() < 0.1:
            text = "".join(rng.sample(text, len(text)))
        texts.append(text)
    return texts
