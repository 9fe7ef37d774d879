"""OpenAI's Agents SDK (pip install openai-agents) runs its own loop against toka: two tools, both APIs, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from running_server import RunningServer
from scripted_chat import says

agents = pytest.importorskip("agents", reason="needs openai-agents")
if not hasattr(agents, "function_tool"):  # another module of this name, such as our benchmark's
    pytest.skip("needs openai-agents", allow_module_level=True)

WARM = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'


def _plan(prompt: str) -> str:
    """A model that asks for the weather, then for a conversion, and then answers with what it was told."""
    results = re.findall(r"\[tool\](.*)\n", prompt)
    if not results:
        return f"<think>Weather first.</think>I look.\n<tool_call>\n{WARM}\n</tool_call>"
    if len(results) == 1:
        celsius = json.dumps({"name": "to_fahrenheit", "arguments": {"celsius": int(results[0])}})
        return f"<tool_call>\n{celsius}\n</tool_call>"
    return f"It is {results[1]} degrees Fahrenheit."


@agents.function_tool
def get_weather(city: str) -> str:
    """The temperature in a city, in degrees Celsius."""
    assert city == "Oslo"
    return "10"


@agents.function_tool
def to_fahrenheit(celsius: int) -> str:
    """Convert a temperature."""
    return str(celsius * 9 // 5 + 32)


def _agent(server: RunningServer, api: str) -> agents.Agent:
    agents.set_tracing_disabled(True)
    kinds = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}
    model = kinds[api](model="default", openai_client=server.async_openai)
    return agents.Agent("weather man", instructions="Help.", model=model, tools=[get_weather, to_fahrenheit])


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_over_two_tools(start_chat_server, api: str, stream: bool) -> None:
    server = start_chat_server(says(_plan))

    async def run() -> agents.RunResultBase:
        agent = _agent(server, api)
        if not stream:
            return await agents.Runner.run(agent, "How warm is Oslo?")
        result = agents.Runner.run_streamed(agent, "How warm is Oslo?")
        async for _ in result.stream_events():
            pass
        return result

    result = asyncio.run(run())
    assert result.final_output == "It is 50 degrees Fahrenheit."
    called = [item.raw_item.name for item in result.new_items if isinstance(item, agents.ToolCallItem)]
    assert called == ["get_weather", "to_fahrenheit"]
    assert len(server.engine.submitted()) == 3
    assert all(
        submit.sampling.structured.kind == "lark" for submit in server.engine.submitted()
    )  # the SDK's tools are strict
