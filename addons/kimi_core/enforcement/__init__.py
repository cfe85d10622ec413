"""ensure_tool_call: a model is asked again until its reply has a tool call, or says it is done.

The request offers one more tool, `done`, and says at its end that every reply needs a call.
How the replies become one is the matter of `kimi_core.attempts`.
"""

from kimi_core.enforcement.decider import Enforcement
from kimi_core.enforcement.request import prepare

__all__ = ["Enforcement", "prepare"]
