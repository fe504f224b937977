"""One attempt of a call, from its grant to its settlement. It settles once, whatever happens and whoever says so."""

from __future__ import annotations

from dataclasses import replace

import httpx2

from paceline_client._grant import Grant
from paceline_client._model import HeaderSource, Usage
from paceline_client._outcome import CallOutcome, from_exception, from_refusal, from_response
from paceline_client.hooks._scan import Scanner, read_body, scanner
from paceline_client.hooks._size import Seen, Size
from paceline_client.hooks._trouble import trouble


class Attempt:
    """Follows one attempt. No method raises, blocks or waits: the application's call goes on whatever happens here."""

    __slots__ = ("__weakref__", "_early", "_open", "_scanner", "_seen", "_size", "grant", "key", "status")

    def __init__(self, grant: Grant, size: Size, seen: Seen) -> None:
        self.grant = grant
        self.key: str | None = None
        """The API key to make it with. ``None``: that of the SDK client."""
        self.status = 200
        self._size = size
        self._seen = seen
        self._scanner: Scanner | None = None
        self._early = False
        # Taken out by the first who settles; taking out is atomic.
        self._open = [True]

    @property
    def settled(self) -> bool:
        return not self._open

    # -- an answer that comes in one piece ----------------------------------------------------------------------

    def answered(self, status: int, headers: httpx2.Headers, body: bytes) -> None:
        """The whole answer is here."""
        if status >= 400:
            self._settle(from_refusal(status, headers, body))
            return
        usage: Usage | None = None
        model = ""
        try:
            if body:
                usage, model = read_body(body)
        except ValueError:
            # Not JSON: somebody on the way has answered.
            pass
        except Exception as error:
            trouble("the body of a response", error)
        self._succeeded(status, headers.raw, usage, model)

    def replaced(self, answer: object) -> None:
        """Somebody between the hook and the network has answered with an object of their own."""
        try:
            self._settle(from_response(answer))
        except Exception as error:
            trouble("the body of a response", error)
            self._succeeded(self.status, None, None, "")

    # -- an answer that is read later -----------------------------------------------------------------------------

    def arrived(self, status: int, headers: httpx2.Headers) -> None:
        """The headers are here; the body is shown to :meth:`feed` as it comes."""
        self.status = status
        try:
            self.grant.report(headers.raw, status)
            self._scanner = scanner(headers.get("content-type", ""), headers.get("content-encoding", ""))
        except Exception as error:
            trouble("the headers of a response", error)

    def feed(self, data: bytes) -> None:
        """The next piece of the body."""
        reader = self._scanner
        if reader is None or not self._open:
            return
        try:
            reader.feed(data)
            produced = reader.produced
            if produced is not None:
                self.grant.progress(produced)
            if reader.begun and not self._early:
                self._early = True
                self.grant.report(usage=reader.usage)
            if reader.error is not None:
                self._aborted(reader)
            elif reader.complete:
                self._complete(reader)
        except Exception as error:
            trouble("the body of a response", error)
            self._scanner = None

    def exhausted(self) -> None:
        """The body has ended as it should."""
        reader = self._scanner
        if not self._open:
            return
        if reader is None:
            # Of a kind that cannot be read here.
            self._succeeded(self.status, None, None, "")
            return
        try:
            reader.end()
        except Exception as error:
            trouble("the body of a response", error)
            self._succeeded(self.status, None, None, "")
            return
        if reader.complete and reader.error is None:
            self._complete(reader)
        else:
            # The connection was closed in good order, but in the middle of the answer.
            self._aborted(reader)

    def dropped(self) -> None:
        """Nobody reads the rest: it was closed, or cut off, or thrown away."""
        if self._open:
            self._aborted(self._scanner)

    # -- no answer --------------------------------------------------------------------------------------------------

    def failed(self, error: BaseException, *, sent: bool = True) -> None:
        """The attempt raised, before there was an answer."""
        if sent:
            self._settle(from_exception(error, started=False))
        else:
            self._settle(CallOutcome("not_sent"))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _complete(self, reader: Scanner) -> None:
        usage = reader.usage
        if usage is not None:
            self._succeeded(self.status, None, usage, reader.model)
            return
        produced = reader.produced
        self._settle(
            CallOutcome(
                "succeeded",
                self.status,
                usage=None if produced is None else Usage(output_tokens=produced),
                usage_kind="missing" if produced is None else "partial",
                served_model=reader.model,
            )
        )

    def _succeeded(self, status: int, headers: HeaderSource | None, usage: Usage | None, model: str) -> None:
        if usage is not None and (usage.cache_read_tokens or usage.cache_write_tokens):
            self._seen.add(self._size.marks)
        self._settle(
            CallOutcome(
                "succeeded",
                status,
                headers,
                usage=usage,
                usage_kind="missing" if usage is None else "final",
                served_model=model,
            )
        )

    def _aborted(self, reader: Scanner | None) -> None:
        usage: Usage | None = None
        outcome = CallOutcome("aborted", self.status, usage_kind="missing")
        if reader is not None:
            usage, produced = reader.usage, reader.produced
            if produced is not None:
                usage = replace(usage or Usage(), output_tokens=produced)
            outcome.error = reader.error
            outcome.served_model = reader.model
        if usage is not None:
            outcome.usage, outcome.usage_kind = usage, "partial"
        self._settle(outcome)

    def _settle(self, outcome: CallOutcome) -> None:
        try:
            self._open.pop()
        except IndexError:
            return
        self._scanner = None
        try:
            self.grant._settle(outcome)
        except Exception as error:
            trouble("a settlement", error)
