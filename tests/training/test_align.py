"""Texts find their times in audio that spells them, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenizer.text import TextTokenizer
from training.align import Alphabet, Utterance, align, normalized, read_alignments, train_speller
from training.examples import places_in_text


def spoken(text: str, alphabet: Alphabet, generator: torch.Generator) -> tuple[Utterance, np.ndarray]:
    """A made-up recording: every character sounds for some frames, in a direction of its own."""
    ids, places = alphabet.spell(text)
    rows, middles, at = [torch.zeros(3, 16)], [], 3
    for i in ids:
        count = int(torch.randint(1, 5, (), generator=generator))
        sound = torch.zeros(count, 16)
        sound[:, i] = 2.0
        rows += [sound, torch.zeros(1, 16)]  # a short silence after each
        middles.append(at + count / 2)
        at += count + 1
    latents = torch.cat(rows)
    latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
    utterance = Utterance(key=text, length=len(normalized(text)), latents=latents, ids=ids, places=places)
    return utterance, np.interp(np.arange(len(text)), places, middles)


def test_times_of_a_made_up_language_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    # Letters at random: words would let the network spell one where it hears another part of it.
    letters = torch.randint(0, 9, (96, 24), generator=generator).tolist()
    texts = ["".join("abcdefgh "[i] for i in row).strip() for row in letters]
    alphabet = Alphabet(texts)
    made = [spoken(text, alphabet, generator) for text in texts]
    speller = train_speller([utterance for utterance, _ in made], len(alphabet), steps=200)
    errors = [np.abs(align(speller, utterance) - middles) for utterance, middles in made]
    spelled = np.concatenate([e[[c != " " for c in u.key]] for (u, _), e in zip(made, errors, strict=True)])
    assert np.median(spelled) < 1.0 and np.quantile(spelled, 0.95) < 2.5


def test_spelling_leaves_out_what_is_not_spoken() -> None:
    alphabet = Alphabet(["don't go", "\u00dcber uns"])
    ids, places = alphabet.spell("\u201cDon't  GO!\u201d")
    text = normalized("\u201cDon't  GO!\u201d")
    assert "".join(alphabet.characters[i - 1] for i in ids) == "don't go"
    assert [text[p] for p in places] == list("don't go")
    assert alphabet.spell("...") == ([], [])


def test_places_run_from_before_the_first_piece_to_after_the_last() -> None:
    text = TextTokenizer.train(["abc abd acd bcd"] * 3, vocab_size=300)
    frames = np.array([5.0, 6.0, 7.0], dtype=np.float32)
    places = places_in_text(text, "abc", frames, 12)
    pieces = len(text.spans("abc"))
    assert places.shape == (13,) and (places.diff() >= 0).all()
    assert places[0] == 0 and places[-1] == pieces + 1
    # Piece by piece: the middle of the last one is spoken in frame 7.
    assert abs(places[7].item() - pieces) < 0.6


def test_spans_cover_the_characters(tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = TextTokenizer.train(["the cat sat on the mat"] * 3, vocab_size=300)
    words = "The  cat, \u201csat\u201d 12"
    found = text.spans(words)
    assert len(found) == len(text.encode(words)) - 1
    assert all(b <= e for b, e in found) and all(a[0] <= b[0] for a, b in zip(found, found[1:], strict=False))
    piece = next((b, e) for (b, e) in found if normalized(words)[b:e] and "s" in normalized(words)[b:e])
    assert normalized(words)[piece[0]] == "s"


def test_a_damaged_file_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert list(read_alignments(tmp_path)) == []
    (tmp_path / "alignment.jsonl").write_text('{"key": "a", "frames": [1, 2]}\n{"key": "b"\n')
    rows = read_alignments(tmp_path)
    assert next(rows)[0] == "a"
    with pytest.raises(Exception, match=r"alignment.jsonl:2 is damaged"):
        next(rows)
