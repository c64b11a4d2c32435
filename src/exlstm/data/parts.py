"""What of the documents is trained on and what is held out, and each in pieces that tokenizers can take one by one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from exlstm.data import files
from exlstm.data.files import Document

# From this many documents on, whole ones are held out.
MANY = 10
# A line ends within so many bytes, or a text is parted between two characters.
TAIL = 1 << 16
LINE_END = re.compile(rb"(?<=\S)\r?\n")


class Part(NamedTuple):
    """Bytes `begin` to `end` of a document."""

    document: Document
    begin: int
    end: int

    def pieces(self) -> Iterator[tuple[bool, bytes]]:
        """The text in pieces of about files.BLOCK bytes, each with whether a document begins there (a row of a table is one).

        A piece ends where a tokenizer parts the text in any case, before the end of a line, so that its tokens are those of
        the whole; where no line ends it ends behind a character.
        """
        begins, held = True, b""
        for first, piece in self._inside():
            if first and held:
                yield begins, held
                begins, held = True, b""
            held += piece
            while len(held) > files.BLOCK:
                end = _line_end(held[: files.BLOCK])
                yield begins, held[:end]
                begins, held = False, held[end:]
        if held:
            yield begins, held

    def _inside(self) -> Iterator[tuple[bool, bytes]]:
        """The document's own pieces, and of those at the edges what is inside."""
        place, first = 0, True
        for begins, piece in files.pieces(self.document):
            inside = piece[max(0, self.begin - place) : max(0, self.end - place)]
            place += len(piece)
            if inside:
                yield begins or first, inside
                first = False


def _line_end(data: bytes) -> int:
    """Where the last line of the data ends behind something visible, or before its last character."""
    for found in reversed([*LINE_END.finditer(data, max(0, len(data) - TAIL))]):
        end = found.start()
        if not data[max(0, end - 4) : end].decode("utf-8", "ignore")[-1:].isspace():
            return end
    end = len(data) - 1
    while end > len(data) - 4 and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def divide(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Part], list[Part]]:
    """What is trained on, and about `share` of the bytes that is held out: documents in the order of a seeded hash of
    their names, which is the same wherever they lie; with fewer files than MANY, the end of the whole text."""
    total = sum(d.size for d in documents)
    if len(documents) < MANY:
        return _cut(documents, int((1 - share) * total))
    ranked = sorted(documents, key=lambda d: rank(d.name, seed))
    goal, size, held = share * total, 0, []
    # The first is always trained on.
    for document in ranked[1:]:
        nearer = size + document.size / 2 <= goal
        if nearer:
            held.append(document)
            size += document.size
    held = held or [min(ranked, key=lambda d: abs(d.size - goal))]
    paths = {d.path for d in held}
    train = [d for d in documents if d.path not in paths]
    return [Part(d, 0, d.size) for d in train], [Part(d, 0, d.size) for d in held]


def rank(name: str, seed: int) -> bytes:
    """Where a document stands in an order that depends on the seed."""
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def _cut(documents: Sequence[Document], place: int) -> tuple[list[Part], list[Part]]:
    """The text before byte `place` and the text from there on; a character or row that it would tear goes to the former."""
    before, after = [], []
    for document in documents:
        cut = min(max(place, 0), document.size)
        if 0 < cut < document.size:
            cut = _whole(document, cut)
        before.append(Part(document, 0, cut))
        after.append(Part(document, cut, document.size))
        place -= document.size
    return [p for p in before if p.begin < p.end], [p for p in after if p.begin < p.end]


def _whole(document: Document, cut: int) -> int:
    """The first place from `cut` on where a character, or in a table a row, begins."""
    place = 0
    for _, piece in files.pieces(document):
        end = place + len(piece)
        if document.field and place < cut < end:
            return end
        while place <= cut < end and piece[cut - place] & 0xC0 == 0x80:
            cut += 1
        if cut < end:
            return cut
        place = end
    return cut
