"""Several upstream requests for one reply: whoever finds a reply not to be enough asks for more.

Each reply passes to the client as it comes, except its end and the calls that are for us; when
it is over, those who joined the exchange's `Turn` decide in their order whether it was enough.
The replies to all attempts are one reply to the client; its usage has the prompt of the last
request and the output of all.

Two dialects: OpenAI's chat.completions and Anthropic's messages, streamed and whole.
"""

from kimi_core.attempts.job import join, stage
from kimi_core.attempts.turn import Call, Decider, Ending, Message, Turn

__all__ = ["Call", "Decider", "Ending", "Message", "Turn", "join", "stage"]
