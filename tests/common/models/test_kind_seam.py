"""A new architecture is chosen by a recipe: its settings, and what computes it, are two entries."""

from __future__ import annotations

from typing import Literal

import pytest

from common.config.model import ModelConfig
from common.config.recipe import dump_config, load_config
from common.errors import ConfigError
from common.models.build import DECODERS, build_policy
from tests.common.models.test_decoder_seam import Toy


def test_a_recipe_chooses_an_architecture_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelConfig, "kinds", {**ModelConfig.kinds})

    class ToyConfig(ModelConfig):
        kind: Literal["toy"] = "toy"
        places: bool = True

    monkeypatch.setitem(DECODERS, ToyConfig, lambda config: Toy())
    config = load_config(None, ["model={kind: toy, places: false}"])
    assert config.model == ToyConfig(places=False)
    assert isinstance(build_policy(config.model).decoder, Toy)
    assert "places: false" in dump_config(config)
    with pytest.raises(ConfigError, match=r"model.xpos has no effect here: kind is toy; .* palm"):
        load_config(None, ["model.kind=toy", "model.xpos=true"])
    with pytest.raises(ConfigError, match=r"model.places has no effect here: kind is palm"):
        load_config(None, ["model.places=true"])
