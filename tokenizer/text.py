"""Text and tags as ids: the prefix that tells a language model what to say or play."""

from __future__ import annotations

import difflib
import io
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from tokenizer.errors import UserError
from tokenizer.files import replacing

AUDIO_SYMBOL = "<audio>"
"""Ends every prefix: what follows is frames."""
_FILE_NAME = "text.model"


class TextTokenizer:
    """Sentencepiece over lower-cased NFKC text, with bytes for whatever the pieces do not cover.

    Tags are symbols of their own, written `<speech>` in the model's file and `speech` everywhere else. Text that
    happens to spell such a symbol stays text.

    `tokenizer.huggingface_text` has another kind, of the pieces of a published language model.

    Args:
        model: A serialized sentencepiece model that has the symbol `<audio>`.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = self._pieces.get_piece_size()
        # Learned pieces have negative log-probabilities; only symbols given at training score 0.
        symbols = {
            self._pieces.id_to_piece(i): i
            for i in range(size)
            if self._pieces.get_score(i) == 0.0
            and not (self._pieces.is_byte(i) or self._pieces.is_control(i) or self._pieces.is_unknown(i))
        }
        if AUDIO_SYMBOL not in symbols:
            raise ValueError(f"the sentencepiece model lacks the symbol {AUDIO_SYMBOL}")
        self.audio_id: int = symbols.pop(AUDIO_SYMBOL)
        self._tag_ids = {symbol[1:-1]: i for symbol, i in symbols.items()}
        self._known: set[str] | None = None

    @classmethod
    def train(
        cls, sentences: Iterable[str], path: Path | None = None, *, vocab_size: int = 512, tags: Sequence[str] = ()
    ) -> TextTokenizer:
        """Learn pieces from sentences; the same sentences in the same order give the same model, byte for byte.

        Args:
            sentences: Text, a sentence each; read once.
            path: Where to save the model (a file or a folder), if anywhere.
            vocab_size: Ids in all: padding, unknown, `<audio>`, the tags, 256 bytes, and the rest for pieces. Fewer
                pieces result when the sentences do not yield that many.
            tags: Names of tags, such as `speech` or `speaker:kathleen`.

        Raises:
            UserError: no text, a bad tag, or a vocabulary too small for the characters of the text.
        """
        symbols = [AUDIO_SYMBOL, *(f"<{name}>" for name in tag_names(tags))]
        cleaned = [line for line in (_without_symbols(normalized(s), symbols).strip() for s in sentences) if line]
        if not cleaned:
            raise UserError("there is no text to learn pieces from; give at least one sentence")
        least = 2 + len(symbols) + 256
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(cleaned),
                model_writer=written,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                normalization_rule_name="nmt_nfkc",
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9995,
                user_defined_symbols=symbols,
                pad_id=0,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                num_threads=1,
                shuffle_input_sentence=False,
                max_sentence_length=1 << 20,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"vocab_size={vocab_size} does not hold the characters of the text beside {least} fixed ids; "
                f"use at least {max(2 * least, 512)}"
            ) from error
        tokenizer = cls(written.getvalue())
        if path is not None:
            tokenizer.save(path)
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read a model of either kind from a file, or from `text.model` in a folder.

        Raises:
            UserError: no such file, or not a text model of this program.
        """
        path = Path(path) / _FILE_NAME if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such text model; check the path")
        content = path.read_bytes()
        kind: type[TextTokenizer] = TextTokenizer
        if content.startswith(b"{"):  # no sentencepiece model does
            from tokenizer.huggingface_text import HuggingFaceText

            kind = HuggingFaceText
        try:
            return kind(content)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is damaged or no text model of hybridlm; restore the file") from error

    def save(self, path: Path) -> None:
        """Write the model to a file, or to `text.model` in a folder that exists."""
        path = Path(path) / _FILE_NAME if Path(path).is_dir() else Path(path)
        with replacing(path) as temporary:
            temporary.write_bytes(self._model)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._pieces.get_piece_size())

    @property
    def first_text_id(self) -> int:
        """Ids from here on are text; below are padding, unknown, `<audio>` and the tags."""
        return max((self.audio_id, *self._tag_ids.values())) + 1

    @property
    def pad_id(self) -> int:
        """Fills the left of shorter prefixes in a batch."""
        return int(self._pieces.pad_id())

    @property
    def tags(self) -> list[str]:
        """Names of the known tags, in the order of their ids."""
        return list(self._tag_ids)

    def encode(self, text: str | None = None, tags: Sequence[str] = (), max_pieces: int | None = None) -> list[int]:
        """Return the prefix: tag ids in the given order, text pieces, the id of `<audio>`.

        Args:
            text: What is to be said; None or empty for no text.
            tags: Names of known tags.
            max_pieces: Longest allowed prefix, in ids.

        Raises:
            UserError: an unknown tag (its nearest neighbours are named), or a prefix that is too long.
        """
        ids = [self.tag_id(tag) for tag in tags]
        if text:
            ids += self._text_ids(text)
        ids.append(self.audio_id)
        if max_pieces is not None and len(ids) > max_pieces:
            raise UserError(
                f"the text has {len(ids)} pieces with its tags, but at most {max_pieces} fit; "
                "shorten it, or split it into sentences"
            )
        return ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each piece of the text, begin and end among the characters of the text in NFKC and lower case."""
        whole = normalized(text)
        spans: list[tuple[int, int]] = []
        at = 0
        for i in self._text_ids(text):
            begin = at
            if self._pieces.is_byte(i):
                # The first of a character's bytes moves on by the character, the others stay on it.
                first = not 0x80 <= int(self._pieces.id_to_piece(i)[3:5], 16) < 0xC0
                while first and whole[at : at + 1].isspace():
                    at += 1
                begin = at if first else max(0, at - 1)
                at += first
            else:
                for character in self._pieces.id_to_piece(i).replace("\u2581", ""):
                    found = whole.find(character, at)
                    if found >= 0:
                        begin = found if begin == at else begin
                        at = found + 1
            spans.append((min(begin, len(whole)), min(max(at, begin), len(whole))))
        return spans

    def letters(self, text: str) -> tuple[int, str]:
        """How many letters the text has, and those of them that no piece has, which are read byte by byte."""
        if self._known is None:
            pieces = range(self.first_text_id, self.vocab_size)
            self._known = {c for i in pieces if not self._pieces.is_byte(i) for c in self._pieces.id_to_piece(i)}
        letters = [c for c in normalized(text) if c.isalpha()]
        return len(letters), "".join(c for c in letters if c not in self._known)

    def tag_id(self, tag: str) -> int:
        """Id of a tag, given as `speech` or `<speech>`.

        Raises:
            UserError: for an unknown tag.
        """
        name = _tag_name(tag)
        if name not in self._tag_ids:
            near = difflib.get_close_matches(name, self._tag_ids, n=3, cutoff=0.3) or list(self._tag_ids)[:5]
            hint = f"did you mean {' or '.join(near)}?" if near else "this model has no tags"
            raise UserError(f"unknown tag '{name}'; {hint}")
        return self._tag_ids[name]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without tags, `<audio>` and padding."""
        special = {self.audio_id, self.pad_id, *self._tag_ids.values()}
        return str(self._pieces.decode([int(i) for i in ids if int(i) not in special]))

    def _text_ids(self, text: str) -> list[int]:
        symbols = [AUDIO_SYMBOL, *(f"<{name}>" for name in self._tag_ids)]
        return list(self._pieces.encode(_without_symbols(normalized(text), symbols)))


def tag_names(tags: Iterable[str]) -> list[str]:
    """Names of tags given as `speech` or `<speech>`, each once.

    Raises:
        UserError: a name that can't be one.
    """
    names = list(dict.fromkeys(_tag_name(tag) for tag in tags))
    for name in names:
        if not name or any(c.isspace() or c in "<>" for c in name) or name != normalized(name) or name == "audio":
            raise UserError(f"tag {name!r} must be lower-case, without spaces or <>, and not 'audio'; rename it")
    return names


def _tag_name(tag: str) -> str:
    return tag[1:-1] if tag.startswith("<") and tag.endswith(">") else tag


def normalized(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _without_symbols(text: str, symbols: Sequence[str]) -> str:
    """Take the brackets off text that spells a symbol; sentencepiece would otherwise read it as the symbol."""
    while any(symbol in text for symbol in symbols):  # again for <<audio>>, which only then spells the symbol
        for symbol in symbols:
            text = text.replace(symbol, symbol[1:-1])
    return text
