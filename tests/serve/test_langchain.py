"""LangChain's client against the server: an answer with its reasoning's cost, a stream, an error."""

from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI


@pytest.fixture
def chat(server) -> Any:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="asked", max_retries=0, seed=1, max_tokens=40, stream_usage=True
    ).bind(logit_bias={"0": 1.0, "3": 3.0})


def test_langchain_asks_and_streams(chat) -> None:
    whole = chat.invoke("What helps against fever?")
    assert whole.content and whole.usage_metadata["output_tokens"] <= 40
    assert whole.usage_metadata["output_token_details"]["reasoning"] > 0
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    chunks = list(chat.stream("What helps against fever?"))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert whole.usage_metadata == next(chunk.usage_metadata for chunk in reversed(chunks) if chunk.usage_metadata)
    logprobs = (
        chat.bind(logprobs=True, top_logprobs=2).invoke("What helps against fever?").response_metadata["logprobs"]["content"]
    )
    assert "".join(token["token"] for token in logprobs) == whole.content or "�" in str(logprobs)


def test_langchain_hears_what_is_refused(chat) -> None:
    with pytest.raises(openai.BadRequestError, match="call no tools"):
        chat.bind(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("Why?")
    with pytest.raises(openai.BadRequestError, match="no role system"):
        chat.invoke([("system", "Be brief."), ("user", "Why?")])
