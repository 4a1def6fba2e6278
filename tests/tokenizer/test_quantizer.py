"""Residual quantization against the vector-quantize-pytorch package, and how its codebooks move."""

from __future__ import annotations

import torch
from vector_quantize_pytorch import ResidualVQ

from tokenizer.quantizer import ResidualQuantizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parity_with_vector_quantize_pytorch() -> None:
    ours = ResidualQuantizer(num_codebooks=4, codebook_size=32, dim=8)
    theirs = ResidualVQ(dim=8, num_quantizers=4, codebook_size=32).eval()
    with torch.no_grad():
        for k, layer in enumerate(theirs.layers):
            layer._codebook.embed.copy_(ours.codebooks[k][None])
    z = torch.randn(3, 17, 8, generator=generator())
    quantized, indices, _ = theirs(z)
    codes = ours.encode(z)
    assert torch.equal(codes, indices.transpose(1, 2))
    torch.testing.assert_close(ours.decode(codes), quantized, atol=1e-5, rtol=1e-5)


def test_every_codebook_lowers_the_error() -> None:
    quantizer = ResidualQuantizer(num_codebooks=4, codebook_size=32, dim=4)
    z = torch.randn(1, 2000, 4, generator=generator())
    for step in range(60):
        quantizer.update(z, decay=0.8, revive_below=0.5, generator=generator(step))
    codes = quantizer.encode(z)
    errors = [float((quantizer.decode(codes[:, :k]) - z).square().mean()) for k in (1, 2, 3, 4)]
    assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors


def test_update_moves_codes_to_the_mean_of_what_chose_them() -> None:
    quantizer = ResidualQuantizer(num_codebooks=1, codebook_size=2, dim=1)
    quantizer.codebooks.copy_(torch.tensor([[[-1.0], [1.0]]]))
    z = torch.tensor([[[-3.0], [-2.0], [4.0], [6.0]]])
    for _ in range(50):
        quantizer.update(z, decay=0.5, revive_below=0.0, generator=generator())
    torch.testing.assert_close(quantizer.codebooks[0, :, 0], torch.tensor([-2.5, 5.0]))


def test_dead_codes_restart_in_the_batch() -> None:
    quantizer = ResidualQuantizer(num_codebooks=1, codebook_size=8, dim=2)
    quantizer.codebooks.fill_(100.0)
    z = torch.randn(1, 500, 2, generator=generator())
    for step in range(20):
        quantizer.update(z, decay=0.5, revive_below=0.1, generator=generator(step))
    assert quantizer.codebooks.abs().max() < 10
    assert len(quantizer.encode(z).unique()) == 8


def test_codebooks_get_no_gradient() -> None:
    quantizer = ResidualQuantizer(num_codebooks=2, codebook_size=4, dim=2)
    assert not list(quantizer.parameters())
