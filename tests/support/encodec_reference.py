"""The `encodec` package's own model with the weights of one of our random tokenizers."""

from __future__ import annotations

import warnings

import torch
from encodec import EncodecModel

from tokenizer.encodec import EncodecTokenizer


def package_model(tokenizer: EncodecTokenizer) -> EncodecModel:
    """The package's 24 kHz model, weight-normalized as published, whose folded weights are the tokenizer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch on the package's weight_norm
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    own = tokenizer.state_dict()
    state = model.state_dict()
    for key in state:
        if key.endswith("weight_g"):
            weight = own[key.removesuffix("_g")]
            state[key] = torch.norm_except_dim(weight, 2, 0)
            state[key.removesuffix("_g") + "_v"] = 3.0 * weight  # the direction's length must not matter
        elif key in own:
            state[key] = own[key]
    model.load_state_dict(state)
    model.set_target_bandwidth(6.0)
    return model
