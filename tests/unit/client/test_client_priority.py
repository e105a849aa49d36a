"""A client whose requests wait in a class."""

from __future__ import annotations

from ollama_distributed.client.transport import Settings


def test_the_class_rides_in_a_header_of_every_request() -> None:
    def headers(priority: str | None) -> dict[str, str]:
        settings = Settings("http://127.0.0.1:1", None, 1.0, 0, verify=True, priority=priority)  # type: ignore[arg-type]
        found: dict[str, str] = settings.httpx_arguments("http://127.0.0.1:1", keep_alive=False)["headers"]
        return found

    assert headers("batch")["x-ollama-priority"] == "batch"
    assert "x-ollama-priority" not in headers(None)
