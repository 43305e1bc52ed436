"""Credentials kept out of everything that is written: run.json, plan, stats, logs."""

from __future__ import annotations

import re
from typing import Any

SECRET = re.compile(
    r"secret|passw|credential|connection_?string|(api|access|account|private|auth)_?(key|token)|(^|_)(token|key|sas)$",
    re.IGNORECASE,
)
SIGNATURE = re.compile(r"([?&][^=&\s]*(?:sig|signature|credential|token|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
BLANK = "(redacted)"


def redacted(values: Any, key: str = "") -> Any:
    """The same values with anything that looks like a credential blanked.

    By key, and in URLs the user part and signatures of the query.
    """
    if SECRET.search(key) and values is not None:
        return BLANK
    if isinstance(values, dict):
        return {k: redacted(v, str(k)) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [redacted(v) for v in values]
    if isinstance(values, str) and "://" in values:
        return SIGNATURE.sub(rf"\g<1>{BLANK}", re.sub(r"://[^/\s]+@", f"://{BLANK}@", values))
    return values
