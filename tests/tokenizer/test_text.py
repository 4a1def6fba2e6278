from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.errors import UserError
from tokenizer.text import TextTokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells by the sea shore, and the shells she sells are sea shells.",
    "How much wood would a woodchuck chuck if a woodchuck could chuck wood?",
]
TAGS = ["speech", "music", "speaker:kathleen"]
TOKENIZER = TextTokenizer.train(SENTENCES, vocab_size=340, tags=TAGS)


def test_prefix_is_tags_then_pieces_then_audio() -> None:
    ids = TOKENIZER.encode("The sea", ["music", "speaker:kathleen"])
    assert ids[:2] == [TOKENIZER.tag_id("music"), TOKENIZER.tag_id("speaker:kathleen")]
    assert ids[-1] == TOKENIZER.audio_id
    assert ids.count(TOKENIZER.audio_id) == 1
    assert TOKENIZER.decode(ids) == "the sea"
    assert len(set(TOKENIZER.encode("", TAGS))) == 4


@pytest.mark.parametrize("text", [None, "", "   ", "\n"])
def test_empty_text_leaves_tags_and_audio(text: str | None) -> None:
    assert TOKENIZER.encode(text) == [TOKENIZER.audio_id]
    assert TOKENIZER.encode(text, ["speech"]) == [TOKENIZER.tag_id("speech"), TOKENIZER.audio_id]


def test_tags_and_ids() -> None:
    assert TOKENIZER.tags == TAGS
    assert TOKENIZER.vocab_size <= 340
    assert TOKENIZER.pad_id not in TOKENIZER.encode("the sea", TAGS)
    assert TOKENIZER.tag_id("<speech>") == TOKENIZER.tag_id("speech")


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Z"]), min_size=1, max_size=20))
def test_any_characters_survive(text: str) -> None:
    """Emoji, Han, whatever: pieces or bytes, never the unknown id."""
    ids = TOKENIZER.encode(text)
    assert 1 not in ids
    assert max(ids) < TOKENIZER.vocab_size
    once = TOKENIZER.decode(ids)
    assert TOKENIZER.decode(TOKENIZER.encode(once)) == once


def test_case_and_compatibility_forms_do_not_matter_but_umlauts_do() -> None:
    assert TOKENIZER.encode("THE \uff33\uff25\uff21") == TOKENIZER.encode("the sea")
    assert TOKENIZER.decode(TOKENIZER.encode("Größe 😀")) == "größe 😀"


def test_digits_are_single() -> None:
    tokenizer = TextTokenizer.train([f"in {year} the sea shells of {year}" for year in (1999, 2024)] * 30)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1999 2024")]
    assert [piece for piece in pieces if piece] == list("19992024")


@pytest.mark.parametrize(
    "text", ["<audio>", "<AUDIO>", "a <speech> b", "\uff1caudio\uff1e", "<<audio>>", "<au<audio>dio>"]
)
def test_text_cannot_spell_a_symbol(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids.index(TOKENIZER.audio_id) == len(ids) - 1
    assert TOKENIZER.tag_id("speech") not in ids


def test_sentences_cannot_make_a_symbol_either() -> None:
    tokenizer = TextTokenizer.train([*SENTENCES, "<b> <b> <b> <b> <b> <speech> <speech>"] * 5, tags=["speech"])
    assert tokenizer.tags == ["speech"]


def test_training_is_deterministic_and_files_keep_everything(tmp_path: Path) -> None:
    TextTokenizer.train(SENTENCES, tmp_path / "a.model", vocab_size=340, tags=TAGS)
    TextTokenizer.train(iter(SENTENCES), tmp_path, vocab_size=340, tags=TAGS)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "text.model").read_bytes()
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.tags == TAGS
    assert loaded.encode("Sea shells 7", ["music"]) == TOKENIZER.encode("Sea shells 7", ["music"])
    loaded.save(tmp_path / "b.model")
    assert TextTokenizer.load(tmp_path / "b.model").encode("fox") == TOKENIZER.encode("fox")


def test_tiny_corpus_gives_a_small_vocabulary() -> None:
    tokenizer = TextTokenizer.train(["a b"], vocab_size=512)
    assert tokenizer.vocab_size < 512
    assert tokenizer.decode(tokenizer.encode("zebra")) == "zebra"


def test_unknown_tag_names_its_neighbours() -> None:
    with pytest.raises(UserError, match="unknown tag 'speach'; did you mean speech"):
        TOKENIZER.encode("", ["speach"])
    with pytest.raises(UserError, match="this model has no tags"):
        TextTokenizer.train(SENTENCES, vocab_size=340).encode("", ["speech"])


def test_long_text_names_the_limit_and_the_remedy() -> None:
    assert len(TOKENIZER.encode("sea", max_pieces=9)) <= 9
    with pytest.raises(UserError, match="at most 9 fit; shorten it, or split it into sentences"):
        TOKENIZER.encode("sea " * 50, max_pieces=9)


@pytest.mark.parametrize("tag", ["", "Speech", "two words", "a<b", "audio"])
def test_bad_tags_are_refused(tag: str) -> None:
    with pytest.raises(UserError, match="rename it"):
        TextTokenizer.train(SENTENCES, vocab_size=340, tags=[tag])


def test_bad_training_input() -> None:
    with pytest.raises(UserError, match="there is no text"):
        TextTokenizer.train(["", "  "])
    with pytest.raises(UserError, match="vocab_size=100 does not hold"):
        TextTokenizer.train(SENTENCES, vocab_size=100)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such text model"):
        TextTokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    whole = (tmp_path / "text.model").read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        (tmp_path / "text.model").write_bytes(content)
        with pytest.raises(UserError, match="damaged or no text model"):
            TextTokenizer.load(tmp_path)


def test_letters_that_no_piece_has_are_found() -> None:
    text = TextTokenizer.train(["hello world", "the quick brown fox"], vocab_size=300)
    assert text.letters("Hello, FOX! 12") == (8, "")
    assert text.letters("hello мир ok") == (10, "мир")
    pieces = text.encode("мир")
    assert len(pieces) > 6  # bytes, two a letter
