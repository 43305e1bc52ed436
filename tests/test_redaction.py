"""Credentials are blanked by the name of their key and inside URLs, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.redaction import BLANK, redacted, without

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "https://bucket.s3.amazonaws.com/x.parquet?X-Amz-Credential=hunter2%2F2026&X-Amz-Signature=hunter2",
        "https://bucket.s3.amazonaws.com/x.parquet?X-Amz-Security-Token=hunter2&partNumber=1",
        "https://a.blob.core.windows.net/c/x.parquet?sv=2024&sig=hunter2&se=2026",
        "https://storage.googleapis.com/b/x?GoogleAccessId=me&Signature=hunter2",
        "https://host/x?api_key=hunter2",
        "https://host/x?access_token=hunter2#part",
        "s3://AKIA:hunter2@bucket/x",
        "https://hunter2@host/x",
        "https://user:hunter2@host:8080/x?y=1",
        "see https://user:hunter2@host/x?sig=hunter2 for more",
    ],
)
def test_urls_lose_user_and_signature(url: str) -> None:
    for value in (url, [url], {"path": [url, "other"]}, ("plain", url)):
        text = json.dumps(redacted(value))
        assert SECRET not in text
        assert BLANK in text


def test_the_rest_of_a_url_and_of_a_text_stays() -> None:
    url = "https://host/x?partNumber=1&sig=hunter2&se=2026"
    assert redacted(url) == f"https://host/x?partNumber=1&sig={BLANK}&se=2026"
    prompt = "Why? See https://a.org/?key=hunter2 and, if the token = 3,\nanswer {{ text }} & stop"
    assert redacted(prompt) == prompt.replace("hunter2", BLANK)
    assert redacted("mail me@example.com, key=3") == "mail me@example.com, key=3"
    for url in ("abfs://container@account.dfs.core.windows.net/x", "abfss://container@account.dfs.core.windows.net/x"):
        assert redacted(url) == url


@pytest.mark.parametrize("value", [SECRET, 7, [SECRET], {"inner": SECRET}, {"a": [{"b": SECRET}]}, (SECRET,), True])
@pytest.mark.parametrize("key", ["token", "hf_token", "apiKey", "client_secret", "passwords", "sas", "a.b.api_key"])
def test_a_secret_key_hides_whatever_it_holds(key: str, value: Any) -> None:
    assert redacted({"outer": {key: value}, "x": 1}) == {"outer": {key: BLANK}, "x": 1}
    assert redacted({key: None}) == {key: None}, "nothing is no secret"


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "max_new_tokens",
        "prefill_tokens",
        "stop_token_ids",
        "keys",
        "monkey",
        "columns",
        "keyboard",
        "key_x",
    ],
)
def test_innocent_keys_are_left_alone(key: str) -> None:
    assert redacted({key: SECRET}) == {key: SECRET}


def test_an_error_is_told_without_the_secrets_of_the_options() -> None:
    options = {
        "key": "hunter2", "endpoint_url": "https://host", "anon": False, "timeout": 30,
        "client_kwargs": {"aws_session_token": "hunter22", "region_name": "north"}, "token": {"private_key": "hunter3"},
        "x": ["hunter4", "ab"],
    }  # fmt: skip
    text = "hunter2, hunter22, hunter3 and hunter4 at https://host in north, a cab, 30 s: False"
    assert (
        without(text, options) == f"{', '.join([BLANK] * 3)} and {BLANK} at https://host in north, a cab, 30 s: False"
    )
    assert without("https://me:pass@host?sig=abc", {}) == f"https://{BLANK}@host?sig={BLANK}"
    assert without(text, {}) == text


PLAIN = st.none() | st.booleans() | st.integers() | st.text("abc ?&=@", max_size=9)
NESTED = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3)
)


@given(NESTED)
def test_values_without_secrets_stay_as_they_are(value: Any) -> None:
    assert redacted(value) == value
    assert redacted(redacted({"token": value, "plain": value})) == redacted({"token": value, "plain": value})
