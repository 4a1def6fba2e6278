"""One pass over all rows of a corpus, however many: bad rows, exact copies, what splits share, speed of reading.

Nothing is decoded: of each file its size and a few kilobytes from its middle are read. Memory stays the same from some
hundred thousand rows on; from there on copies are counted among those files, texts and speakers whose hashes are the
smallest, which is the same choice for every split.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from training.manifest import Clip
from training.verdict import Verdict, judge

TABLE_SIZE = 200_000
"""Most files, texts and speakers that are remembered, each."""
BYTES_READ = 4096
SPEAKER_LABELS = ("speaker", "speaker_id", "voice")
FASTEST = 30.0
"""Characters a second that nobody speaks."""
ODD_RATIO = 2.5
"""A text is odd when it is read so many times faster or slower than the corpus's median."""
BINS_A_DECADE = 50


@dataclass(kw_only=True, slots=True)
class Seen:
    """Where one key came up."""

    count: int = 0
    splits: set[str] = field(default_factory=set)
    clips: list[str] = field(default_factory=list)


class Table:
    """How often each key came, and in which splits; of more keys than fit, those of the smallest hashes are kept."""

    def __init__(self, size: int = TABLE_SIZE) -> None:
        self.size = size
        self.seen: dict[int, Seen] = {}
        self._bound = 1 << 64

    @property
    def share(self) -> float:
        """Share of all keys that is kept."""
        return self._bound / (1 << 64)

    def add(self, key: str, split: str | None, clip: str) -> None:
        """Count a clip under its key."""
        digest = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        if digest >= self._bound:
            return
        seen = self.seen.setdefault(digest, Seen())
        seen.count += 1
        if split is not None:
            seen.splits.add(split)
        if len(seen.clips) < 2:
            seen.clips.append(clip)
        while len(self.seen) > self.size:
            self._bound //= 2
            self.seen = {digest: seen for digest, seen in self.seen.items() if digest < self._bound}

    def repeated(self) -> list[Seen]:
        """Keys that came more than once."""
        return [seen for seen in self.seen.values() if seen.count > 1]

    def shared(self) -> list[Seen]:
        """Keys that came in more than one split."""
        return [seen for seen in self.seen.values() if len(seen.splits) > 1]

    def about(self) -> str:
        """How many keys the figures rest on."""
        return f"{len(self.seen)}" + ("" if self.share == 1 else f" (a sample of {self.share:.2%})")


class Pace:
    """Characters a second of texts, as a histogram, and the clips at both ends."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self._fast: list[tuple[float, str]] = []
        self._slow: list[tuple[float, str]] = []

    def add(self, words: str, seconds: float, clip: str) -> None:
        """Count a text that lasts so long."""
        pace = max(len(words), 1) / max(seconds, 1e-3)
        bin_ = round(BINS_A_DECADE * math.log10(pace))
        self.counts[bin_] = self.counts.get(bin_, 0) + 1
        for heap, rank in ((self._fast, pace), (self._slow, -pace)):
            heapq.heappush(heap, (rank, clip))
            if len(heap) > 10:
                heapq.heappop(heap)

    def verdict(self) -> Verdict:
        """Whether texts fit the time they are said in."""
        name, total = "transcripts", sum(self.counts.values())
        if total == 0:
            return judge(name, "no clip has a text", remedy="")
        middle, reached = 0, 0
        for middle in sorted(self.counts):
            reached += self.counts[middle]
            if 2 * reached >= total:
                break
        width = BINS_A_DECADE * math.log10(ODD_RATIO)
        fastest = BINS_A_DECADE * math.log10(FASTEST)
        odd = sum(n for bin_, n in self.counts.items() if abs(bin_ - middle) > width or bin_ > fastest)
        median = 10 ** (middle / BINS_A_DECADE)
        ends = [(pace, clip) for pace, clip in sorted(self._fast, reverse=True)]
        ends += [(-pace, clip) for pace, clip in sorted(self._slow, reverse=True)]
        examples = [
            f"{clip} at {pace:.1f}"
            for pace, clip in ends
            if pace > FASTEST or not median / ODD_RATIO <= pace <= median * ODD_RATIO
        ]
        return judge(
            name,
            f"{odd} of {total} texts do not fit their duration (median {median:.1f} characters a second)",
            look=odd > 0,
            broken=odd > 0.3 * total and total >= 5,
            remedy="read these texts against their audio, and mend or drop them",
            figures={"texts": total, "odd": odd, "median_characters_per_s": median},
            examples=examples,
        )


class CorpusPass:
    """What is gathered of every row.

    Args:
        num_sampled: Clips kept for checks that decode, each row with the same chance.
        table_size: See `Table`.
        seed: Of the sample.
    """

    def __init__(self, num_sampled: int, *, table_size: int = TABLE_SIZE, seed: int = 0) -> None:
        self.num_sampled, self.num_clips, self.num_problems = num_sampled, 0, 0
        self.problems: list[str] = []
        self.sample: list[Clip] = []
        self.splits: dict[str, int] = {}
        self.files, self.texts, self.speakers = Table(table_size), Table(table_size), Table(table_size)
        self.pace = Pace()
        self._random = random.Random(seed)

    def read(self, rows: Iterable[Clip | str]) -> None:
        """Go through a corpus."""
        for row in rows:
            if isinstance(row, str):
                self._problem(row)
                continue
            try:
                self.files.add(_file_key(row), row.split, row.key)
            except OSError as error:
                self._problem(f"{row.path}: {error.strerror}")
                continue
            self._count(row)

    def _problem(self, text: str) -> None:
        self.num_problems += 1
        if len(self.problems) < 10:
            self.problems.append(text)

    def _count(self, clip: Clip) -> None:
        self.num_clips += 1
        if clip.split is not None:
            self.splits[clip.split] = self.splits.get(clip.split, 0) + 1
        # Every row has the same chance of being in the sample, however many follow (algorithm R).
        if len(self.sample) < self.num_sampled:
            self.sample.append(clip)
        elif (place := self._random.randrange(self.num_clips)) < self.num_sampled:
            self.sample[place] = clip
        if clip.text:
            self.texts.add(" ".join(clip.text.lower().split()), clip.split, clip.key)
            seconds = clip.read_duration or clip.duration
            if seconds:
                self.pace.add(clip.text, seconds, clip.key)
        for label in SPEAKER_LABELS:
            if label in clip.labels:
                self.speakers.add(clip.labels[label], clip.split, clip.labels[label])
                break

    def verdicts(self) -> list[Verdict]:
        """Of all rows; the speed of reading is judged apart, once sampled clips are timed."""
        return [self._rows(), self._copies(), *self._leaks()]

    def _rows(self) -> Verdict:
        total = self.num_clips + self.num_problems
        return judge(
            "rows",
            f"{self.num_problems} of {total} cannot be used",
            look=self.num_problems > 0,
            broken=2 * self.num_problems > total,
            remedy="mend or drop them",
            figures={"rows": total, "problems": self.num_problems},
            examples=self.problems,
        )

    def _copies(self) -> Verdict:
        copies = self.files.repeated()
        extra = sum(seen.count - 1 for seen in copies)
        return judge(
            "exact copies",
            f"{extra} clips are copies of another, of {self.files.about()} different ones",
            look=extra > 0,
            remedy="drop the copies",
            figures={"copies": extra, "different": len(self.files.seen), "share_looked_at": self.files.share},
            examples=[" = ".join(seen.clips) for seen in copies],
        )

    def _leaks(self) -> list[Verdict]:
        if len(self.splits) < 2:
            return [judge("splits", "no two splits are named; fine-tuning holds back whole texts by itself", remedy="")]
        names = ", ".join(f"{name} {count}" for name, count in sorted(self.splits.items()))
        same = self.files.shared()
        texts, speakers = self.texts.shared(), self.speakers.shared()
        return [
            judge(
                "same audio in two splits",
                f"{len(same)} of {self.files.about()} recordings ({names})",
                broken=bool(same),
                remedy="take them out of one split: test figures would praise memory",
                figures={"recordings": len(same), "splits": self.splits},
                examples=[" = ".join(seen.clips) for seen in same],
            ),
            judge(
                "same text in two splits",
                f"{len(texts)} of {self.texts.about()} texts",
                look=bool(texts),
                remedy="split by text, unless several voices read the same on purpose",
                figures={"texts": len(texts)},
                examples=[" and ".join(seen.clips) for seen in texts],
            ),
            judge(
                "same speaker in two splits",
                f"{len(speakers)} of {self.speakers.about()} speakers",
                look=bool(speakers) and len(self.speakers.seen) > 1,
                remedy="test figures then say nothing of new voices; split by speaker if they should",
                figures={"speakers": len(speakers)},
                examples=[seen.clips[0] for seen in speakers],
            ),
        ]


def _file_key(clip: Clip) -> str:
    """Size, a part of the middle, and which piece of the file the clip is."""
    with clip.open() as file:
        size = file.seek(0, 2)
        file.seek(max(0, size // 2 - BYTES_READ // 2))
        middle = hashlib.blake2b(file.read(BYTES_READ), digest_size=16).hexdigest()
    return f"{size} {middle} {clip.start} {clip.end}"
