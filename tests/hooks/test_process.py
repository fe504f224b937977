"""What can only be seen in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.client.fake import Fake
from tests.hooks.stub import MODEL, Stub


def run(code: str, **environment: str) -> str:
    """Run it with every warning an error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-X", "dev", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=50,
        env=clean | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning" not in done.stderr
    return done.stdout


CALL = f"""
    import sys
    from anthropic import Anthropic
    from paceline_client.hooks.anthropic import PacelineMiddleware
    client = Anthropic(api_key="k", base_url=URL, middleware=[PacelineMiddleware(tenant="t")])
    ask = dict(model={MODEL!r}, max_tokens=9, messages=[dict(role="user", content="x")])
"""


def test_disabled_by_the_environment_nothing_is_done(upstream: Stub) -> None:
    code = f"URL = {upstream.url!r}" + textwrap.dedent(CALL)
    code += textwrap.dedent(
        """
        import httpx2
        assert client.messages.create(**ask).usage.output_tokens == 5
        with client.messages.create(**ask, stream=True) as stream:
            assert "paceline" not in type(stream.response.stream).__module__
            assert len(list(stream)) == 9
        client.close()
        assert not [name for name in sys.modules if name.partition(".")[0] in ("grpc", "google")], sys.modules
        """
    )
    run(code, PACELINE_DISABLED="1")


def test_a_stream_that_is_open_when_the_interpreter_ends_is_settled(coordinator: Fake, upstream: Stub) -> None:
    code = f"URL = {upstream.url!r}" + textwrap.dedent(CALL)
    code += textwrap.dedent(
        """
        stream = client.messages.create(**ask, stream=True)
        next(stream); next(stream); next(stream)
        """
    )
    run(code, PACELINE_ADDRESS=coordinator.address)
    (commit,) = coordinator.wait_for("commit")
    assert commit.outcome.usage.input_tokens == 12


def test_the_library_needs_no_sdk() -> None:
    run(
        """
        import sys
        import paceline_client, paceline_client.hooks
        assert not {"anthropic", "openai", "httpx2"} & set(sys.modules)
        """
    )


@pytest.mark.parametrize(("sdk", "fix"), [("anthropic", "paceline-client[anthropic]"), ("openai", "openai>=3")])
def test_a_missing_sdk_is_said_with_what_to_do(sdk: str, fix: str) -> None:
    out = run(
        f"""
        import sys
        sys.modules[{sdk!r}] = None
        try:
            import paceline_client.hooks.{sdk}
        except ImportError as error:
            print(error)
        """
    )
    assert fix in out
