"""Answers of many parts: fetched page by page, shown one below the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from paceline.cli.console import say, say_json
from paceline.cli.remote import Remote, as_dict


class _Request(Protocol):
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


RequestT = TypeVar("RequestT", bound=_Request)
PageT = TypeVar("PageT", bound=_Page)
PartT = TypeVar("PartT", bound=Message)


def pages(
    remote: Remote, method: grpc.UnaryUnaryMultiCallable[RequestT, PageT], request: RequestT, timeout: float
) -> Iterator[PageT]:
    """All pages of an rpc that lists; ``timeout`` seconds for each."""
    while True:
        page = method(request, timeout=timeout, metadata=remote.metadata)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def show_each(found: Sequence[PartT], as_json: bool, nothing: str, show: Callable[[PartT], None]) -> None:
    """Each part with a line between, or all as JSON; ``nothing`` is what is said when there is none."""
    if as_json:
        say_json([as_dict(each) for each in found])
        return
    if not found:
        say(nothing)
    for place, each in enumerate(found):
        if place:
            say("")
        show(each)
