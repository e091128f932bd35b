"""A hole in a file → token ids, in the layout that the model's family was trained on. The folder's door to the rest.

Markers enter as ids; what users wrote never becomes one, whatever it spells. A model without markers continues the
prefix. Knows no request and no engine; tables, frames, budgets and detection are in the files fim_*.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tabstop.checkpoint import Checkpoint
from tabstop.errors import InputError
from tabstop.text.fim_budget import divide, keep_end, keep_files, keep_start
from tabstop.text.fim_detection import choose
from tabstop.text.fim_families import Family
from tabstop.text.fim_frames import FRAMES, Frame, Part, Surroundings, Token
from tabstop.text.healing import Cut, Healer
from tabstop.text.tokenizer import Encoding, Tokenizer

ANCHOR = "☺"
"""Opens text that continues other text, for vocabularies that put a blank before every text; taken off again."""

NOWHERE = Surroundings()


@dataclass(frozen=True, slots=True)
class Hole:
    """A cursor in a file. `order`: psm, spm or "" for the family's own; an empty suffix is the file's end."""

    prefix: str
    suffix: str = ""
    around: Surroundings = NOWHERE
    order: str = ""
    ahead: str = ""  # text that follows the prefix and is kept whole, whatever must be cut (the cursor's line)

    @property
    def num_characters(self) -> int:
        return len(self.prefix) + len(self.suffix) + len(self.ahead) + sum(len(file.text) for file in self.around.files)

    @property
    def has_crlf(self) -> bool:
        """Whether its file ends lines with CRLF."""
        return "\r\n" in self.prefix or "\r\n" in self.suffix

    def with_newlines(self) -> Hole:
        """The same with LF line ends, as models know them."""
        if "\r" not in self.prefix + self.suffix + self.ahead:
            return self
        prefix, suffix, ahead = (text.replace("\r\n", "\n") for text in (self.prefix, self.suffix, self.ahead))
        return Hole(prefix, suffix, self.around, self.order, ahead)


@dataclass(slots=True)
class FillReport:
    """What became of a hole; goes into the answer and the metrics."""

    family: str | None  # None: the prefix was simply continued
    order: str = ""
    cut_tokens: dict[str, int] = field(default_factory=dict)  # of prefix, suffix and files; only what was cut
    healed_tokens: int = 0  # taken back from the end of the prefix
    transcoded: str = ""  # the family in whose markers the client wrote


@dataclass(frozen=True, slots=True)
class FilledPrompt:
    """The ids, and what is needed to read the answer."""

    ids: list[int]
    report: FillReport
    healed: bytes = b""  # the answer begins with these bytes, which the client has already
    stop_strings: tuple[str, ...] = ()


class FillIn:
    """How one model fills holes. Immutable; its methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, family: Family | None) -> None:
        self.family = family
        self._tokenizer = tokenizer
        names = family.stop_tokens if family else ()
        ids = {name: tokenizer.token_id(name) for name in names}
        self.marker_ids = frozenset(token_id for token_id in ids.values() if token_id is not None)
        """Tokens that no text of a user may become, and after which a hole is over."""
        parts = ("prefix", "suffix", "middle")
        self.layout_ids = frozenset(ids[family.marker(p)] for p in parts if family.marker(p)) if family else frozenset()
        """The family's markers: a raw prompt that holds one was laid out by its client."""

        spelled = sorted({re.escape(name.removeprefix("▁")) for name in names})
        self._spelled = re.compile(f"(?={'|'.join(spelled)})" if spelled else "(?!)")  # also those that overlap

    @property
    def name(self) -> str | None:
        return self.family.name if self.family else None

    def encode(self, hole: Hole, budget: int, healer: Healer | None = None) -> FilledPrompt:
        """At most `budget` tokens. Raises InputError for an order that the family was not trained on.

        An empty suffix becomes what the family takes for one. `healer`: takes the prefix back to a stable border.
        """
        hole, report = self._cut(hole.with_newlines(), budget)
        frame = self._frame(hole.around)
        prefix = self._plain(frame.head + hole.prefix + hole.ahead)
        cut = healer.cut(prefix, keep=0 if self.family else 1) if healer else Cut(prefix)
        report.healed_tokens = cut.num_removed
        ids = self._lay_out(hole, frame, cut.ids, report)
        return FilledPrompt(ids, report, cut.removed, self._stop_strings(hole))

    # ---- inside

    def _stop_strings(self, hole: Hole) -> tuple[str, ...]:
        if self.family is None:
            return ()
        extra = ("\n+++++ ",) if self.family.frame == "mistral" and hole.around.files else ()
        return self.family.stop_strings + extra

    def _frame(self, around: Surroundings) -> Frame:
        if self.family is None:
            return Frame()
        return FRAMES[self.family.frame](around, lambda token: self._tokenizer.token_id(token) is not None)

    def _order(self, hole: Hole) -> str:
        assert self.family is not None
        order = hole.order or next(iter(self.family.orders))
        if order not in self.family.orders:
            known = " or ".join(self.family.orders)
            raise InputError(f"{self.family.name} was not trained on {order!r}; use {known}", param="fim_order")
        return order

    def _lay_out(self, hole: Hole, frame: Frame, prefix_ids: list[int], report: FillReport) -> list[int]:
        if self.family is None:
            return self._tokenizer.with_bos(prefix_ids)
        report.order = self._order(hole)
        suffix_ids = self._inside(hole.suffix or self.family.empty_suffix)
        texts = {"P": self._encode_parts(frame.opening) + prefix_ids, "S": suffix_ids}
        ids = [*self._encode_parts(frame.before)]
        for part in self.family.orders[report.order]:
            ids += texts[part] if part in texts else [self._marker_id(self.family.marker(part))]
        return self._tokenizer.with_bos(ids + self._encode_parts(frame.after))

    def _marker_id(self, spelling: str) -> int:
        token_id = self._tokenizer.token_id(spelling)
        assert token_id is not None, spelling
        return token_id

    def _encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Ids of a frame; a token that this vocabulary lacks is left out."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Token):
                token_id = self._tokenizer.token_id(part.spelling)
                ids += [] if token_id is None else [token_id]
            else:
                ids += self._inside(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        """Ids of a text that opens a prompt; no marker among them."""
        ids = self._tokenizer.encode(text, control=False)
        return self._broken(text) if self.marker_ids.intersection(ids) else ids

    def _broken(self, text: str) -> list[int]:
        """For vocabularies whose markers are ordinary pieces: the text in pieces that hold no marker."""
        places = [0, *(match.start() + 1 for match in self._spelled.finditer(text)), len(text)]
        ids: list[int] = []
        for start, end in pairwise(places):
            piece = text[start:end]
            ids += self._continued(piece) if start else self._tokenizer.encode(piece, control=False)
        return [token_id for token_id in ids if token_id not in self.marker_ids]

    def _inside(self, text: str) -> list[int]:
        """Ids of a text that follows other text; no marker among them."""
        ids = self._continued(text)
        if not self.marker_ids.intersection(ids):
            return ids
        anchored = self._broken(ANCHOR + text)
        num_anchor_ids = self._num_anchor_ids(anchored)
        return anchored[num_anchor_ids:] if num_anchor_ids else self._broken(text)

    def _continued(self, text: str) -> list[int]:
        """Ids of a text without the blank that some vocabularies put before every text."""
        if not text:
            return []
        if not self._tokenizer.strips_space:
            return self._tokenizer.encode(text, control=False)
        ids = self._tokenizer.encode(ANCHOR + text, control=False)
        num_anchor_ids = self._num_anchor_ids(ids)
        return ids[num_anchor_ids:] if num_anchor_ids else self._tokenizer.encode(text, control=False)

    def _num_anchor_ids(self, ids: list[int]) -> int:
        """How many of the first ids spell ANCHOR, which is too rare to be joined to other text; 0: it has no tokens."""
        anchor = ANCHOR.encode()
        for count in range(1, len(anchor) + 2):
            if self._tokenizer.bytes_of(ids[:count]).lstrip(b" ") == anchor:
                return count
        return 0

    def _encoding(self, text: str) -> Encoding:
        return self._tokenizer.encode_with_offsets(text, control=False)

    def _cut(self, hole: Hole, budget: int) -> tuple[Hole, FillReport]:
        """The hole with texts short enough, and a report of what was cut."""
        report = FillReport(self.name)
        files = [*hole.around.files] if self.family else []
        wants = {
            "prefix": len(self._encoding(hole.prefix).ids),
            "suffix": len(self._encoding(hole.suffix).ids) if self.family else 0,
            "files": sum(len(self._encoding(f"{file.path}\n{file.text}").ids) + 3 for file in files),
        }
        room = budget - self._overhead(hole)
        if sum(wants.values()) <= room:
            return hole, report
        shares = divide(max(0, room), list(wants.values()))
        prefix = keep_end(hole.prefix, shares[0], self._encoding)
        suffix = keep_start(hole.suffix, shares[1], self._encoding) if self.family else ""
        kept = keep_files(files, shares[2], self._encoding)
        around = Surroundings(kept, hole.around.repo_name, hole.around.path, hole.around.language)
        left = (
            len(self._encoding(prefix).ids),
            len(self._encoding(suffix).ids),
            sum(len(self._encoding(f"{file.path}\n{file.text}").ids) + 3 for file in kept),
        )
        lost = zip(wants.items(), left, strict=True)
        report.cut_tokens = {name: want - size for (name, want), size in lost if want > size}
        return Hole(prefix, suffix, around, hole.order, hole.ahead), report

    def _overhead(self, hole: Hole) -> int:
        """Tokens beside the three texts, and a few for seams."""
        bare = Surroundings((), hole.around.repo_name, hole.around.path, hole.around.language)
        frame = self._frame(bare)
        parts = (*frame.before, *frame.opening, frame.head, hole.ahead, *frame.after)
        return len(self._encode_parts(parts)) + 8


def load_fill_in(checkpoint: Checkpoint, tokenizer: Tokenizer, asked: str = "auto") -> FillIn:
    """How a checkpoint fills holes. `asked`: auto, off or a family's name. Raises ConfigError."""
    return FillIn(tokenizer, choose(checkpoint, tokenizer, asked))
