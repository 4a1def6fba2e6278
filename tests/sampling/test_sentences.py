"""Where sentences end, and what becomes of those that are too long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling.sentences import sentences


@pytest.mark.parametrize(
    "expected",
    [
        ["Good morning to all of you.", "How are you today?", "Very well, thank you!"],
        ["Mr. Smith met Dr. Jones at 5 p.m. in St. Albans.", "They talked about J. S. Bach for hours."],
        ["It cost 3.50 dollars in 1999.", "Then it rose to 1,000.75 dollars."],
        ["“Do you see it?” asked the old man.", "‘I see nothing at all.’", "He went away (slowly.)", "Nobody spoke…"],
        ["She said, “We leave at dawn.”", "“So soon?” he cried, and sat down."],
        ["Wait... what was that noise?", "It was you and I.", "We laughed a good deal?!", "Yes, we really did."],
        ["Er kam am 3. Mai nach Köln, d.h. sehr spät.", "Das war z. B. im 19. Jahrhundert üblich."],
        ["„Wer ist da?“ fragte sie leise.", "„Ich bin es nur.“", "Über Äpfel, Birnen usw. sprach niemand."],
        ["We sold pens, paper, etc.", "Nobody wanted any of it."],
        ["See e.g. the first chapter, No. 5 of the list.", "Ähnlich sah es gegen 8 Uhr aus."],
    ],
)
def test_sentences_end_where_a_reader_would_stop(expected: list[str]) -> None:
    assert sentences(" ".join(expected), 300) == expected
    assert sentences("\n".join(expected).replace(" ", "\n  "), 300) == expected


def test_an_empty_line_ends_a_sentence_and_a_short_one_is_said_with_the_next() -> None:
    assert sentences("The first chapter of it\n\nit began on a Monday.", 300) == [
        "The first chapter of it",
        "it began on a Monday.",
    ]
    assert sentences("No. Not at all, he said. Yes.", 300) == ["No. Not at all, he said.", "Yes."]
    assert sentences("Yes! It rained for the whole day.", 300) == ["Yes! It rained for the whole day."]
    assert sentences("Yes! It rained.", 10) == ["Yes!", "It rained."]
    assert sentences(" \n\n ", 300) == []


def test_a_long_sentence_is_cut_at_commas_then_between_words_then_anywhere() -> None:
    long = "one two three four, five six seven eight; nine ten eleven"
    assert sentences(long, 40) == ["one two three four,", "five six seven eight; nine ten eleven"]
    assert sentences("one two three four five six", 14) == ["one two three", "four five six"]
    assert sentences("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]
    assert sentences("ä" * 6, 5) == ["ää", "ää", "ää"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab AB.!?,…\n\"'12ß", max_size=80), st.integers(4, 30))
def test_nothing_is_lost_and_nothing_too_long(text: str, longest: int) -> None:
    found = sentences(text, longest)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(0 < len(one.encode()) <= longest for one in found)
