"""Making a prompt fit into a number of tokens: the oldest goes first, sentence by sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from paceline_client._errors import CannotFit
from paceline_client._estimate import Scale, as_mapping, characters_per_token, walk_text

Prompt = TypeVar("Prompt", bound="str | Sequence[Any] | Mapping[Any, Any]")

_SYSTEM: Final = frozenset({"system", "developer"})
_ANSWERS: Final = frozenset({"tool", "function"})


def fit_prompt(text_or_messages: Prompt, tokens: int, model: str | None = None) -> Prompt:
    """The prompt without as much of its oldest content as is needed to bring its estimate to ``tokens`` or below.

    Takes what :func:`~paceline_client.estimate_tokens` takes, and returns the same type. What it was given stays as it
    was.

    - A text loses sentences from its beginning. Its last sentence stays.
    - Of messages, the system and developer messages, the tools and the newest message of the user stay as they are. The
      oldest others go first; the oldest that is left loses sentences from its beginning, if it is one of the user's.
      What came after the newest message of the user goes last. A call of a tool and its results go together, and no
      history is left that begins with an answer.

    Raises :class:`~paceline_client.CannotFit` when what must stay is too large by itself.
    """
    if tokens < 0:
        raise ValueError("tokens must not be negative")
    scale = Scale(characters_per_token(model))
    result = _fit(text_or_messages, float(tokens), scale)
    slack = 0.0
    # Sums of fractions may differ in their last digit with the order of their terms.
    while _ceil(scale.prompt(result)) > tokens:
        slack += 0.5
        result = _fit(text_or_messages, tokens - slack, scale)
    return cast(Prompt, result)


def _fit(prompt: object, room: float, scale: Scale) -> object:
    if isinstance(prompt, str):
        kept = _text(prompt, room, lambda text: scale.prompt(text))
        if kept is None:
            raise CannotFit(_ceil(scale.prompt(_last(prompt))), math.ceil(room))
        return kept
    if isinstance(prompt, Mapping):
        return _request(prompt, room, scale)
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        return _same(prompt, _messages(list(prompt), room, 0.0, scale))
    raise TypeError(f"a prompt is a text, messages, or a mapping with messages, not {type(prompt).__name__}")


def _request(request: Mapping[Any, Any], room: float, scale: Scale) -> object:
    if "role" in request:
        _messages([request], room, 0.0, scale)
        return request
    for key in ("messages", "input"):
        value = request.get(key)
        if value is None:
            continue
        fixed = scale.request({k: v for k, v in request.items() if k != key})
        if isinstance(value, str):
            kept = _text(value, room - fixed, lambda text: scale.prompt(text))
            if kept is None:
                raise CannotFit(_ceil(fixed + scale.prompt(_last(value))), math.ceil(room))
            return {**request, key: kept}
        return {**request, key: _same(value, _messages(list(value), room, fixed, scale))}
    needed = scale.request(request)
    if needed - room > 1e-9:
        raise CannotFit(_ceil(needed), math.ceil(room))
    return request


def _messages(messages: list[Any], room: float, fixed: float, scale: Scale) -> list[Any]:
    """The messages that stay, the oldest of them perhaps shortened."""
    costs = [scale.message(message) for message in messages]
    kept = _protected(messages)
    needed = fixed + sum(costs[index] for index in kept)
    if needed - room > 1e-9:
        raise CannotFit(_ceil(needed), math.ceil(room))
    total = fixed + sum(costs)
    groups = _groups(messages, kept)
    newest = max((index for index in kept if not _is_system(messages[index])), default=-1)
    older = [group for group in groups if group[0] < newest]
    later = [group for group in groups if group[0] > newest]
    dropped: set[int] = set()
    changed: dict[int, Any] = {}
    for position, group in enumerate([*older, *later]):
        if total - room <= 1e-9:
            break
        total -= sum(costs[index] for index in group)
        dropped.update(group)
        if total - room > 1e-9 or position >= len(older):
            continue
        shorter = _shortened(messages[group[0]], room - total, scale) if len(group) == 1 else None
        if shorter is not None:
            total += scale.message(shorter)
            dropped.discard(group[0])
            changed[group[0]] = shorter
            break
    if dropped and not changed:
        # A history that was cut must not begin with an answer to what is gone.
        for group in older:
            if group[0] not in dropped:
                if _role(messages[group[0]]) == "user":
                    break
                dropped.update(group)
    return [changed.get(index, message) for index, message in enumerate(messages) if index not in dropped]


def _protected(messages: Sequence[Any]) -> set[int]:
    """The messages that stay: instructions, and the newest of the user."""
    kept = {index for index, message in enumerate(messages) if _is_system(message)}
    others = [index for index in range(len(messages)) if index not in kept]
    newest = next(
        (i for i in reversed(others) if _role(messages[i]) == "user" and not _is_answer(messages[i], whole=True)),
        others[-1] if others else None,
    )
    if newest is None:
        return kept
    # Results of tools are valid only behind the call that they answer.
    for index in reversed(others[: others.index(newest) + 1]):
        kept.add(index)
        if not _is_answer(messages[index]):
            break
    return kept


def _groups(messages: Sequence[Any], kept: set[int]) -> list[list[int]]:
    """The other messages, in order; each with the results of the tools that it called."""
    groups: list[list[int]] = []
    open_group = False
    for index, message in enumerate(messages):
        if index in kept:
            open_group = open_group and _is_system(message)
        elif open_group and _is_answer(message):
            groups[-1].append(index)
        else:
            groups.append([index])
            open_group = True
    return groups


def _shortened(message: Any, room: float, scale: Scale) -> Any | None:
    """A message of the user without its beginning. ``None``: nothing of it would fit, or it cannot be cut."""
    if not isinstance(message, Mapping) or _role(message) != "user":
        return None

    def cost(content: object) -> float:
        return scale.message({**message, "content": content})

    content = message.get("content")
    if isinstance(content, str):
        text = _text(content, room, cost)
        return {**message, "content": text} if text else None
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        return None
    blocks = list(content)
    for index, block in enumerate(blocks):
        rest = blocks[index + 1 :]
        if isinstance(block, Mapping) and isinstance(block.get("text"), str):
            text = _text(block["text"], room, lambda text, b=block, r=rest: cost([{**b, "text": text}, *r]))  # type: ignore[misc]  # captured per turn
            if text:
                return {**message, "content": [{**block, "text": text}, *rest]}
        if rest and room - cost(rest) >= -1e-9:
            return {**message, "content": rest}
    return None


def _text(text: str, room: float, cost: Callable[[str], float]) -> str | None:
    """The longest end of a text, in whole sentences, that fits. ``None``: not even the last one does."""
    if room - cost(text) >= -1e-9:
        return text
    sentences = list(walk_text(text))
    low, high = 1, len(sentences)
    while low < high:
        middle = (low + high) // 2
        if room - cost("".join(sentences[middle:])) >= -1e-9:
            high = middle
        else:
            low = middle + 1
    # Nearly monotonic: a sentence more may cost a little less when it makes the text look like prose.
    for first in range(low, len(sentences)):
        rest = "".join(sentences[first:])
        if room - cost(rest) >= -1e-9:
            return rest
    return None


def _last(text: str) -> str:
    sentences = list(walk_text(text))
    return sentences[-1] if sentences else ""


def _role(message: Any) -> str:
    if isinstance(message, str):
        return "user"
    fields = as_mapping(message)
    return "" if fields is None else str(fields.get("role", ""))


def _is_system(message: Any) -> bool:
    return _role(message) in _SYSTEM


def _is_answer(message: Any, whole: bool = False) -> bool:
    """Results of tools. ``whole``: and nothing else."""
    fields = as_mapping(message)
    if fields is None:
        return False
    if fields.get("role") in _ANSWERS or str(fields.get("type", "")).endswith("_output"):
        return True
    content = fields.get("content")
    if not isinstance(content, Sequence) or isinstance(content, (str, bytes)) or not content:
        return False
    results = [(as_mapping(block) or {}).get("type") == "tool_result" for block in content]
    return all(results) if whole else any(results)


def _same(like: object, messages: list[Any]) -> object:
    return tuple(messages) if isinstance(like, tuple) else messages


def _ceil(cost: float) -> int:
    return math.ceil(cost - 1e-9)
