"""toka: a compiler-driven LLM inference engine and OpenAI-compatible server.

from toka import LLM, SamplingParams
LLM().generate("The capital of France is", SamplingParams(max_tokens=16, temperature=0))
"""

from typing import TYPE_CHECKING, Any

from toka.params import SamplingParams

if TYPE_CHECKING:
    from toka.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":  # late, so that the server and the command line do not import the engine
        from toka.llm import LLM

        return LLM
    raise AttributeError(f"module 'toka' has no attribute {name!r}")
