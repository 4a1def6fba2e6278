"""Text pieces of published language models: the library's ids, moved on to make room for ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_backbones import tiny_words
from tokenizer.errors import UserError
from tokenizer.huggingface_text import HuggingFaceText
from tokenizer.text import TextTokenizer

TEXT = "Good Morning — she sells 3 ﬁsh <|endoftext|> 🐟"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceText:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    words = tiny_words()
    words.enable_padding(length=64)
    words.enable_truncation(4)
    words.save(str(path))
    return HuggingFaceText.published(path, ["speech", "<music>", "speech"])


def test_ids_are_ours_then_the_librarys(text: HuggingFaceText) -> None:
    words = tiny_words()
    ids = text.encode("Good Morning", ["music"])
    assert text.tags == ["speech", "music"]
    assert ids == [3, *(4 + i for i in words.encode("Good Morning").ids), text.audio_id]
    assert text.first_text_id == 4 and text.vocab_size == 4 + words.get_vocab_size()


def test_text_comes_back_and_spells_no_special_symbol(text: HuggingFaceText) -> None:
    ids = text.encode(TEXT, ["speech"])
    assert text.decode(ids) == TEXT
    special = text.first_text_id + tiny_words().token_to_id("<|endoftext|>")
    assert special not in ids


def test_every_piece_has_its_place_in_the_normalized_text(text: HuggingFaceText) -> None:
    spans = text.spans(TEXT)
    assert len(spans) == len(text.encode(TEXT)) - 1
    whole = "good morning — she sells 3 fish <|endoftext|> 🐟"
    assert spans[0][0] == 0 and spans[-1][1] == len(whole)
    assert all(begin <= end for begin, end in spans)
    pieces = [whole[begin:end] for begin, end in spans]
    at = pieces.index("3")
    assert pieces[at : at + 7] == ["3", " ", "fi", "fi", "fi", "s", "h"]  # a ligature of three bytes is two letters
    assert spans[-1] == (len(whole) - 1, len(whole))


def test_letters_that_no_piece_has(text: HuggingFaceText) -> None:
    assert text.letters("ab 3!") == (2, "")
    assert text.letters("aЖbЖ") == (4, "ЖЖ")


def test_a_saved_one_is_told_from_sentencepiece(text: HuggingFaceText, tmp_path: Path) -> None:
    text.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path)
    assert isinstance(loaded, HuggingFaceText)
    assert loaded.encode(TEXT, ["music"]) == text.encode(TEXT, ["music"])
    loaded.save(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == (tmp_path / "text.model").read_bytes()


def test_what_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(UserError, match="is no tokenizer that `tokenizers` can read"):
        HuggingFaceText.published(path)
    (tmp_path / "text.model").write_text('{"tags": []}')
    with pytest.raises(UserError, match="damaged or no text model"):
        TextTokenizer.load(tmp_path)
    tiny_words().save(str(path))
    with pytest.raises(UserError, match="tag 'Speech' must be lower-case"):
        HuggingFaceText.published(path, ["Speech"])
