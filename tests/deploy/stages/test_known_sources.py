"""Which held-out metrics can be measured on which prompts."""

from __future__ import annotations

import pytest

from common.data.prompts import EncodedPrompt
from common.errors import ConfigError
from deploy.stages.policy import require_known_source


def prompt(source: str | None) -> EncodedPrompt:
    return EncodedPrompt(uid="p", text="p", ids=[1], source=source)


@pytest.mark.parametrize("metric", ["score", "score/web", "pass@2", "component/quality"])
def test_what_can_be_measured_is_let_through(metric: str) -> None:
    require_known_source(metric, [prompt("web"), prompt(None)])


def test_a_source_that_nobody_is_of_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metric=score/book: no held-out .* there are web"):
        require_known_source("score/book", [prompt("web")])
    with pytest.raises(ConfigError, match="none with a source"):
        require_known_source("score/web", [prompt(None)])
