"""A text of any length in sentences, each short enough to be said at once; English and German, by plain rules.

A sentence ends at . ! ? or … (and quotes or brackets that close behind it), where white space and then something other
than a small letter follows, or at an empty line. A full stop ends none after an abbreviation, a single letter (J. S.
Bach, z. B.) or, where the next word does not look like a new sentence's, a number (am 3. Mai, but: in 1999. Then).
"""

from __future__ import annotations

import re

_ABBREVIATIONS = """
mr mrs ms dr prof rev hon st sr jr gen col capt lt sgt mt messrs mme mlle vs etc no vol fig ch pp ed approx dept inc ltd
co jan feb mar apr jun jul aug sep sept oct nov dec e.g i.e a.m p.m
hr fr frl nr bzw usw ca bd abb vgl evtl ggf inkl str tel geb gest hl hrsg jh mio mrd sog std zzgl mind max dipl ing d.h
z.b u.a o.ä s.o s.u z.t u.s.w
"""
_ENDING_TOO = "etc usw a.m p.m inc ltd co jr sr jh u.s.w"
_AFTER_ORDINALS = """
januar februar märz april mai juni juli august september oktober november dezember jahrhundert jahrhunderts kapitel
klasse stock
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
"""Of English and German, without the last stop."""
ENDING_TOO = frozenset(_ENDING_TOO.split())
"""Abbreviations that a sentence may end with: before a capital letter they do."""
AFTER_ORDINALS = frozenset(_AFTER_ORDINALS.split())
"""What a German ordinal is mostly followed by, with a capital as any noun."""
SHORTEST_BYTES = 12
"""What is shorter is said together with the next sentence: a model is at a loss with a single word."""
_END = re.compile(r"[.!?…]+[\"'”’»«“)\]]*(?=\s)")
_CLAUSE = re.compile(r"(?<=[;:,–—])\s+|\s+(?=[–—-]\s)")


def sentences(text: str, longest_bytes: int) -> list[str]:
    """The sentences of a text, in order; joined by spaces they are the text but for its white space.

    Args:
        text: Any.
        longest_bytes: A longer sentence (of UTF-8) is cut at a comma or the like, else between words, else within one.
    """
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _of_paragraph(" ".join(paragraph.split())):
            for part in _cut(sentence, longest_bytes):
                both = f"{found[-1]} {part}" if found else part
                if found and len(found[-1].encode()) < SHORTEST_BYTES and len(both.encode()) <= longest_bytes:
                    found[-1] = both
                else:
                    found.append(part)
    return found


def _of_paragraph(text: str) -> list[str]:
    found, start = [], 0
    for end in _END.finditer(text):
        if _ends(text[start : end.end()], text[end.end() :].lstrip()):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def _ends(before: str, after: str) -> bool:
    """Whether a sentence ends between these, the first of which ends in a mark."""
    opening = after.lstrip("\"'“”„‚‘«»([")
    if opening[:1].islower():
        return False
    if not re.search(r"(?<!\.)\.[\"'”’»«“)\]]*$", before):
        return True  # no single full stop
    word = re.split(r"[\s\"'“”„‚‘«»(\[-]", before.rstrip("\"'”’»«“)]").rstrip("."))[-1]
    if word.isdigit():
        # "am 3. Mai" is an ordinal, which English writes without a stop; "in 1999. Dann" ends a sentence.
        follows = re.match(r"\w*", opening)
        return not (len(word) <= 2 and follows is not None and follows.group().lower() in AFTER_ORDINALS)
    if len(word) == 1 and word.isalpha():
        return word == "I"
    return word.lower() not in ABBREVIATIONS or word.lower() in ENDING_TOO


def _cut(sentence: str, longest_bytes: int) -> list[str]:
    """Pieces of at most so many bytes, at the coarsest borders that do."""
    if len(sentence.encode()) <= longest_bytes:
        return [sentence]
    cuts = ((_CLAUSE.split(sentence), " "), (sentence.split(" "), " "), (list(sentence), ""))
    parts, joint = next(((parts, joint) for parts, joint in cuts if len(parts) > 1), ([], ""))
    if not parts:
        return [sentence]  # a single letter
    found: list[str] = []
    for part in (piece for one in parts for piece in _cut(one, longest_bytes)):
        both = f"{found[-1]}{joint}{part}" if found else part
        if found and len(both.encode()) <= longest_bytes:
            found[-1] = both
        else:
            found.append(part)
    return found
