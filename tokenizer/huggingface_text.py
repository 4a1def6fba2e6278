"""The text pieces of a published language model, with our tags beside them.

Only the `tokenizers` library reads them: `text.model` of such a model is JSON, the tags and the published
`tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tokenizer.errors import UserError
from tokenizer.loading import read_json
from tokenizer.text import TextTokenizer, normalized, tag_names

PAD_ID, AUDIO_ID = 0, 1


class HuggingFaceText(TextTokenizer):
    """A published tokenizer: ids are padding, `<audio>` and the tags, then its own, in its order.

    Text goes in as it is written, upper case too, for so the published model learned it. What spells one of its special
    symbols stays text.

    Args:
        model: `{"tags": [...], "tokenizer": {...}}` in JSON.

    Raises:
        ValueError: something else.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            content = json.loads(model)
            tags, definition = tag_names(content["tags"]), json.dumps(content["tokenizer"])
            self._published = Tokenizer.from_str(definition)
        except Exception as error:  # `tokenizers` raises Exception itself
            raise ValueError(str(error)) from error
        self._published.no_padding()
        self._published.no_truncation()
        self._published.encode_special_tokens = True
        self.audio_id = AUDIO_ID
        self._tag_ids = {name: AUDIO_ID + 1 + number for number, name in enumerate(tags)}

    @classmethod
    def published(cls, path: Path, tags: Iterable[str] = ()) -> HuggingFaceText:
        """The pieces of a `tokenizer.json`, and these tags.

        Raises:
            UserError: no such file, one that the library can't read, or a bad tag.
        """
        if not path.is_file():
            raise UserError(f"{path} is missing; save the model's fast tokenizer there (tokenizer.json)")
        content = {"tags": tag_names(tags), "tokenizer": read_json(path)}
        try:
            return cls(json.dumps(content, ensure_ascii=False).encode())
        except ValueError as error:
            raise UserError(f"{path} is no tokenizer that `tokenizers` can read ({error}); save it again") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.first_text_id + self.num_pieces

    @property
    def num_pieces(self) -> int:
        """Number of ids that are the published tokenizer's."""
        return int(max(self._published.get_vocab(with_added_tokens=True).values())) + 1

    @property
    def pad_id(self) -> int:
        """Fills the left of shorter prefixes in a batch."""
        return PAD_ID

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each piece of the text, begin and end among the characters of the text in NFKC and lower case."""
        offsets = self._published.encode(text, add_special_tokens=False).offsets
        return [(len(normalized(text[:begin])), len(normalized(text[:end]))) for begin, end in offsets]

    def letters(self, text: str) -> tuple[int, str]:
        """How many letters the text has, and those of them that take several pieces, being read byte by byte."""
        found = [c for c in text if c.isalpha()]
        unknown = {c for c in set(found) if len(self._text_ids(c)) > 1}
        return len(found), "".join(c for c in found if c in unknown)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without tags, `<audio>` and padding."""
        first = self.first_text_id
        return str(self._published.decode([int(i) - first for i in ids if int(i) >= first], skip_special_tokens=False))

    def _text_ids(self, text: str) -> list[int]:
        return [self.first_text_id + i for i in self._published.encode(text, add_special_tokens=False).ids]
