"""How many tokens a prompt will have, without a tokenizer and without the network.

An estimate is within some 20 to 40 % of the truth; the server corrects it by what it has learned for the route. Text
is looked at by its bytes: how many of them are letters, signs and digits, and which scripts the others belong to. Prose
has few signs, code and JSON many, and each sign is a token of its own more often than a letter is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

# Characters of English prose per token, by what the model's name begins with or contains; the first that fits.
# Newer tokenizers of Claude make up to a third more tokens of the same text than the older ones.
FAMILIES: Final[tuple[tuple[str, float], ...]] = (
    ("claude-2", 3.8),
    ("claude-instant", 3.8),
    ("claude-3", 3.8),
    ("claude-opus-4", 3.6),
    ("claude-sonnet-4", 3.6),
    ("claude-haiku-4", 3.6),
    ("claude", 2.9),
    ("gpt", 4.3),
    ("chatgpt", 4.3),
    ("o1", 4.3),
    ("o3", 4.3),
    ("o4", 4.3),
    ("text-embedding", 4.3),
    ("gemini", 4.0),
    ("gemma", 4.0),
    ("llama", 3.9),
    ("mistral", 3.8),
    ("qwen", 3.8),
    ("deepseek", 3.8),
)
DEFAULT_CHARACTERS: Final = 3.3
"""For a model of no known family, and for none."""
PROSE_SIGNS: Final = 0.05
"""The share of signs and digits in prose."""
SIGN_WEIGHT: Final = 1.2
"""How much denser a text gets with its share of signs."""
DENSEST: Final = 0.5
REFERENCE: Final = 3.8
"""The weights of other scripts hold for tokenizers with so many characters of prose per token."""

# Tokens per character outside ASCII, by the length of its encoding.
TWO_BYTES: Final = 0.55  # accented Latin, Greek, Cyrillic, Hebrew, Arabic
THREE_BYTES: Final = 1.15  # CJK, kana, hangul, Indic scripts, typographic signs
FOUR_BYTES: Final = 2.2  # emoji, rare ideographs

MESSAGE: Final = 4
"""For the frame of a message: its role, and where it begins and ends. Unit: tokens."""
TOOLS: Final = 340
"""For the instructions that come with any tools. Unit: tokens."""
IMAGE: Final = 1_600
IMAGE_LOW: Final = 85
"""For an image whose size is not known. Unit: tokens."""
PAGE_BYTES: Final = 60_000
PAGE: Final = 2_000
"""For a page of a document, and what a page takes in a file."""
AUDIO_BYTES_PER_TOKEN: Final = 1_600
OTHER_BLOCK: Final = 20

_LETTERS: Final = bytes(range(ord("a"), ord("z") + 1)) + bytes(range(ord("A"), ord("Z") + 1)) + b" \n\t\r"

_NOT_LEAD_2: Final = bytes(b for b in range(256) if not 0xC2 <= b <= 0xDF)
_NOT_LEAD_3: Final = bytes(b for b in range(256) if not 0xE0 <= b <= 0xEF)
_NOT_LEAD_4: Final = bytes(b for b in range(256) if not 0xF0 <= b <= 0xF4)

_BASE64_KEYS: Final = frozenset({"data", "file_data"})


def characters_per_token(model: str | None) -> float:
    """Of English prose."""
    name = (model or "").lower().rsplit("/", 1)[-1]
    # As in "eu.anthropic.claude-…" or "models/gemini-…".
    for prefix, value in FAMILIES:
        if name.startswith(prefix) or f".{prefix}" in name:
            return value
    return DEFAULT_CHARACTERS


def text_cost(text: str, per_token: float) -> float:
    """The tokens of a text, as a fraction."""
    if not text:
        return 0.0
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) == len(text):
        plain = len(raw)
        signs = len(raw.translate(None, _LETTERS))
        other = 0.0
    else:
        two = len(raw.translate(None, _NOT_LEAD_2))
        three = len(raw.translate(None, _NOT_LEAD_3))
        four = len(raw.translate(None, _NOT_LEAD_4))
        plain = len(text) - two - three - four
        signs = len(raw.translate(None, _LETTERS)) - (len(raw) - plain)
        scale = max(0.8, min(1.3, REFERENCE / per_token))
        other = (two * TWO_BYTES + three * THREE_BYTES + four * FOUR_BYTES) * scale
    if not plain:
        return other
    density = max(DENSEST, 1.0 - SIGN_WEIGHT * max(0.0, signs / plain - PROSE_SIGNS))
    return plain / (per_token * density) + other


def estimate_tokens(text_or_messages: object, model: str | None = None) -> int:
    """How many input tokens a prompt will have, roughly.

    Takes a text; a list of messages in the shape of Anthropic or OpenAI; or a mapping with ``messages`` (or ``input``)
    beside ``system`` (or ``instructions``) and ``tools``, such as the arguments of the API call. ``model`` chooses the
    tokenizer to assume; without it one in the middle is.
    """
    return math.ceil(Scale(characters_per_token(model)).prompt(text_or_messages) - 1e-9)


@dataclass(frozen=True, slots=True)
class Scale:
    """Weighs prompts for one family of tokenizers. The cost of a prompt is the sum of those of its parts."""

    per_token: float

    def prompt(self, prompt: object) -> float:
        """Any of the shapes of :func:`estimate_tokens`."""
        if isinstance(prompt, str):
            return text_cost(prompt, self.per_token)
        if isinstance(prompt, Mapping):
            return self.request(prompt)
        if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            return sum((self.message(each) for each in prompt), 0.0)
        raise TypeError(f"a prompt is a text, messages, or a mapping with messages, not {type(prompt).__name__}")

    def request(self, request: Mapping[Any, Any]) -> float:
        """The arguments of an API call; or a single message."""
        if "role" in request:
            return self.message(request)
        total = 0.0
        for key in ("system", "instructions"):
            if request.get(key):
                total += self.content(request[key]) + MESSAGE
        for key in ("messages", "input"):
            value = request.get(key)
            if value is not None:
                total += self.prompt(value)
        return total + self.tools(request.get("tools"))

    def tools(self, tools: object) -> float:
        """The definitions of tools."""
        if not isinstance(tools, Sequence) or not tools:
            return 0.0
        return TOOLS + sum((self.json(tool) for tool in tools), 0.0)

    def message(self, message: object) -> float:
        """One message, with its frame."""
        if isinstance(message, str):
            return text_cost(message, self.per_token) + MESSAGE
        fields = as_mapping(message)
        if fields is None:
            return self.json(message) + MESSAGE
        if "role" not in fields and "type" in fields:
            # An item of OpenAI's responses: a call of a function, or its output.
            return self.block(fields) + MESSAGE
        total = self.content(fields.get("content")) + MESSAGE
        for key in ("tool_calls", "function_call", "refusal", "name"):
            if fields.get(key):
                total += self.json(fields[key])
        return total

    def content(self, content: object) -> float:
        """A text, or a list of blocks."""
        if content is None:
            return 0.0
        if isinstance(content, str):
            return text_cost(content, self.per_token)
        if isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
            return sum((self.block(each) for each in content), 0.0)
        return self.block(content)

    def block(self, block: object) -> float:
        """One block of a message."""
        if isinstance(block, str):
            return text_cost(block, self.per_token)
        fields = as_mapping(block)
        if fields is None:
            return self.json(block)
        kind = str(fields.get("type", ""))
        if kind in ("image", "image_url", "input_image"):
            return self._image(fields)
        if kind in ("document", "file", "input_file"):
            return self._document(fields)
        if kind in ("input_audio", "audio"):
            audio = as_mapping(fields.get("input_audio")) or fields
            return _size(audio.get("data")) / AUDIO_BYTES_PER_TOKEN + OTHER_BLOCK
        if kind == "tool_result":
            return self.content(fields.get("content")) + OTHER_BLOCK
        if isinstance(fields.get("text"), str):
            return text_cost(fields["text"], self.per_token)
        if kind == "thinking":
            return text_cost(str(fields.get("thinking", "")), self.per_token)
        return self.json({key: value for key, value in fields.items() if key != "cache_control"})

    def json(self, value: object) -> float:
        """Anything else, as the API would see it."""
        if isinstance(value, str):
            return text_cost(value, self.per_token)
        fields = as_mapping(value)
        text = json.dumps(value if fields is None else fields, ensure_ascii=False, default=_plain)
        return text_cost(text, self.per_token)

    def _image(self, fields: Mapping[str, Any]) -> float:
        source = as_mapping(fields.get("image_url")) or fields
        if source.get("detail") == "low":
            return IMAGE_LOW
        width, height = fields.get("width"), fields.get("height")
        if isinstance(width, int) and isinstance(height, int):
            return min(IMAGE, width * height / 750)
        return IMAGE

    def _document(self, fields: Mapping[str, Any]) -> float:
        source = as_mapping(fields.get("source")) or as_mapping(fields.get("file")) or fields
        kind = source.get("type")
        if kind == "text":
            return text_cost(str(source.get("data", "")), self.per_token) + OTHER_BLOCK
        if kind == "content":
            return self.content(source.get("content")) + OTHER_BLOCK
        size = max(_size(source.get(key)) for key in _BASE64_KEYS)
        return max(1, math.ceil(size * 0.75 / PAGE_BYTES)) * PAGE


def as_mapping(value: object) -> Mapping[str, Any] | None:
    """The fields of a mapping, or of an object of an SDK. ``None``: it is neither."""
    if isinstance(value, Mapping):
        return value
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        found = dump()
        return found if isinstance(found, Mapping) else None
    return None


def walk_text(text: str) -> Iterator[str]:
    """The sentences of a text, each with what ends it. Joined, they are the text."""
    start = 0
    for end in sentence_ends(text):
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def sentence_ends(text: str) -> Iterator[int]:
    """Where sentences end: after a mark with the closing signs and spaces behind it, and after each run of newlines."""
    at, length = 0, len(text)
    while at < length:
        sign = text[at]
        at += 1
        if sign in "。！？\n" or (sign in ".!?" and (at == length or text[at] in " \t\n\r\"'”’)]")):
            while at < length and text[at] in ".!?。！？\"'”’)]》」』":
                at += 1
            while at < length and text[at] in " \t\n\r":
                at += 1
            yield at


def _plain(value: object) -> object:
    fields = as_mapping(value)
    return str(value) if fields is None else fields


def _size(value: object) -> int:
    return len(value) if isinstance(value, (str, bytes)) else 0
