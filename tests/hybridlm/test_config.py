import re

import pytest

from hybridlm.config import ModelConfig
from tests.support.tiny_frames import tiny_config
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 512, "num_heads": 6}, "num_heads=6 must divide hidden_dim=512; use 4 or 8"),
        ({"hidden_dim": 36, "num_heads": 4, "num_kv_heads": 2}, "36 / 4 = 9 must be even"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4; use one of 1, 2, 4"),
        ({"num_output_codebooks": 4}, "num_output_codebooks=4 must lie in 1..num_codebooks=3"),
        ({"num_input_codebooks": 0}, "num_input_codebooks=0 must lie in 1..num_codebooks=3"),
        ({"continuous_input": "features", "feature_dim": 0}, "needs feature_dim > 0"),
        ({"representation": "continuous", "continuous_input": "none"}, "sees no history"),
        ({"dropout": 1.5}, "dropout=1.5 must lie in [0, 1]"),
        ({"scale_floor": 0.0}, "scale_floor=0.0 must be positive"),
        ({"sigma": -1.0}, "sigma=-1.0 must not be negative"),
        ({"alignment_layer": 2}, "alignment_layer=2 must be below num_layers=2"),
        ({"alignment_heads": 5}, "alignment_heads=5 must not exceed num_heads=4"),
    ],
)
def test_impossible_settings_are_told_with_values_and_remedy(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(**changes)


def test_an_unknown_key_names_its_nearest_neighbour():
    with pytest.raises(UserError, match="unknown key 'hiden_dim'; did you mean 'hidden_dim'"):
        from_mapping(ModelConfig, {"vocab_size": 10, "hiden_dim": 3}, where="model")


def test_an_unknown_choice_names_the_choices():
    with pytest.raises(UserError, match=r"model\.fusion='product' must be one of sum, concat"):
        from_mapping(ModelConfig, {"vocab_size": 10, "fusion": "product"}, where="model")


@pytest.mark.parametrize(
    ("representation", "codes", "latents", "continuous"),
    [("discrete", 3, False, "none"), ("continuous", 0, True, "latents"), ("hybrid", 3, True, "latents")],
)
def test_representation_decides_the_streams(representation, codes, latents, continuous):
    config = tiny_config(representation=representation)
    assert config.output_codebooks == config.input_codebooks == codes
    assert config.predicts_latents is latents
    assert config.continuous == continuous
    assert config.has_short_context is (continuous == "latents")
