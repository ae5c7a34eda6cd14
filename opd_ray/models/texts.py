"""The bytes that the tokens of a tokenizer stand for, so that texts of two tokenizers can be laid side by side."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
"""What SentencePiece writes for a space."""


class TokenTexts:
    """Of one tokenizer. Raises ValueError for one whose tokens are not pieces of the text one behind the other."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "it is none of the tokenizers library (tokenizer.json), whose tokens say what they stand for"
            )
        self._tokenizer = tokenizer
        state = backend.decoder.__getstate__() if backend.decoder is not None else b"null"
        self._kinds = set(_kinds(json.loads(state)))
        if "WordPiece" in self._kinds:
            raise ValueError("its WordPiece tokens leave the spaces between words out")
        self._added = {id_: token.content.encode() for id_, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = tokenizer.get_vocab()
        self._texts = [b""] * (1 + max(vocabulary.values()))
        for token, id_ in vocabulary.items():
            self._texts[id_] = self._added[id_] if id_ in self._added else self._of_token(token)

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """What each token stands for; nothing for ids that the tokenizer does not have, as padded models may sample."""
        return [self._texts[id_] if 0 <= id_ < len(self._texts) else b"" for id_ in ids]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the special tokens around it."""
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def begin_longer_token(self, text: bytes) -> bool:
        """Is there a token of ordinary text that begins with ``text`` and goes on?"""
        place = bisect.bisect_right(self._ordered, text)
        return place < len(self._ordered) and self._ordered[place].startswith(text)

    @property
    def begins_with_space(self) -> bool:
        """Is a space in front of a text only how its first token is written? SentencePiece puts it there."""
        return bool(self._kinds & {"Metaspace", "Strip"})

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token of ordinary text."""
        return max(map(len, self._ordered), default=0)

    def differs(self, text: str) -> bool:
        """Do the tokens of ``text`` stand for another text? A space may be put in front, as SentencePiece does."""
        own = b"".join(self.pieces(self.encode([text])[0]))
        return own != text.encode() and own != b" " + text.encode()

    @cached_property
    def _ordered(self) -> list[bytes]:
        return sorted({text for id_, text in enumerate(self._texts) if id_ not in self._added})

    def _of_token(self, token: str) -> bytes:
        if "ByteLevel" in self._kinds:
            if _bytes().keys() >= set(token):
                return bytes(_bytes()[character] for character in token)
            return token.encode()
        if "ByteFallback" in self._kinds and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._kinds & {"Metaspace", "Replace"}:
            token = token.replace(_SPACE, " ")
        return token.encode()


def _kinds(decoder: Any) -> Iterable[str]:
    """The types of a decoder and of those that it consists of, in tokenizers' own JSON."""
    if decoder:
        yield decoder["type"]
        for each in decoder.get("decoders", ()):
            yield from _kinds(each)


@cache
def _bytes() -> dict[str, int]:
    """Which byte each of GPT-2's characters stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # here: a refusal need not load transformers

    return {character: byte for byte, character in bytes_to_unicode().items()}
