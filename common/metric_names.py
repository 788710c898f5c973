"""From a name that was written to its metric in the catalogue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from common.metric_catalogue import Logged


@cache
def logged_as(name: str) -> tuple[Logged, Mapping[str, str]]:
    """Find the metric that a written name is of, and the values of its labels.

    Raises:
        KeyError: it is none of the catalogue.
    """
    for metric in Logged:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(metric))
        if match := re.fullmatch(pattern, name):
            return metric, match.groupdict()
    raise KeyError(f"metric '{name}' is not in common/metric_catalogue.py")


def known_as(name: str) -> Logged | None:
    """Find the metric of a written name; None of one that another version wrote."""
    try:
        return logged_as(name)[0]
    except KeyError:
        return None
