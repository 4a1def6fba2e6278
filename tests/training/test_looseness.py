"""Mass inside the codes' cell: all of it for a density within the cell, none for one far away, falling with depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridlm.checkpoint import Checkpoint
from hybridlm.latent_head import GaussianMixture
from tests.support.tiny_audio_model import tiny_model
from tests.support.toy_corpus import write_cache
from tokenizer.loading import load_tokenizer
from training.corpus import TokenCache
from training.evaluate import evaluate
from training.looseness import cell_mass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_cache(tmp_path_factory.mktemp("corpus"), 6)


def checkpoint(folders: dict[str, str], representation: str = "hybrid") -> Checkpoint:
    made = tiny_model(representation)
    return Checkpoint(model=made.model.eval(), tokenizer=load_tokenizer(folders["tokenizer"]), text=made.text)


def mass(found: Checkpoint, cache: TokenCache) -> tuple[float, ...]:
    return cell_mass(found, [cache[i] for i in range(len(cache))], frames_a_clip=8, max_frames=20)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1.0, 0.0), (1e-4, 100.0)])
def test_the_mass_is_that_of_the_density(
    folders: dict[str, str], scale: float, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around the vectors of the given first codes, moved by `shift` along one dimension."""
    found, cache = checkpoint(folders), TokenCache(Path(folders["cache"]))

    def density(h: torch.Tensor, codes: torch.Tensor) -> GaussianMixture:
        centre = found.tokenizer.dequantize(codes.T[None, :1])[0]
        centre = centre + shift * torch.nn.functional.one_hot(torch.tensor(0), centre.shape[1])
        return GaussianMixture(
            log_weights=torch.zeros(len(h), 1), means=centre[:, None], scales=torch.full_like(centre[:, None], scale)
        )

    monkeypatch.setattr(found.model, "latent_distribution", density)
    shares = mass(found, cache)
    assert len(shares) == 3 and list(shares) == sorted(shares, reverse=True)
    if shift:
        assert shares[-1] < 0.1
    elif scale < 0.01:
        assert shares[0] == 1.0 > shares[1]  # what the deeper codes say, this density does not know
    else:
        assert 0.05 < shares[0] < 0.95 and shares[2] < shares[0]


def test_it_is_told_of_hybrids_alone(folders: dict[str, str]) -> None:
    cache = TokenCache(Path(folders["cache"]))
    found: dict[str, Any] = {
        name: evaluate(checkpoint(folders, name), cache) for name in ("discrete", "continuous", "hybrid")
    }
    assert found["discrete"].cell_mass == found["continuous"].cell_mass == ()
    shares = found["hybrid"].cell_mass
    assert len(shares) == 3 and all(0 <= share <= 1 for share in shares)
    assert evaluate(checkpoint(folders), cache).cell_mass == shares
