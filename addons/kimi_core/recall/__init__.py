"""Recall: the model itself asks for what was left out of its context, and goes on with it.

The request offers one more tool, `kimi_recall`. A reply that calls nothing else is answered
from the store and asked to go on; the client gets all of it as one reply and never sees the
call. Beside calls of the client's own tools a recall is dropped: the client comes back with
results, and the model can ask again. How the replies become one is the matter of
`kimi_core.attempts`.

Two dialects: OpenAI's chat.completions and Anthropic's messages; in others nothing is offered.
"""

from kimi_core.recall.decider import MAX_RECALLS, RECALL, Lookup, Recall, recalls
from kimi_core.recall.request import NAME, prepare

__all__ = ["MAX_RECALLS", "NAME", "RECALL", "Lookup", "Recall", "prepare", "recalls"]
