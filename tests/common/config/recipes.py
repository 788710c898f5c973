"""Recipes for tests, in a file `r.yaml` of the working folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.errors import ConfigError


def load(text: str, *overrides: str, saved: bool = False) -> RunConfig:
    """A recipe of this text, in a file called r.yaml."""
    Path("r.yaml").write_text(text, encoding="utf8")
    return load_config("r.yaml", overrides, saved=saved)


def refusal(text: str, *overrides: str, saved: bool = False) -> str:
    """The one line that it is refused with."""
    with pytest.raises(ConfigError) as error:
        load(text, *overrides, saved=saved)
    assert "\n" not in str(error.value)
    return str(error.value)
