"""Tokens of text, of chat templates and of images, counted offline for each model.

`tokenizer_for(model)` gives the model's own tokenizer where one is public and o200k, marked as
an estimate, where none is. What a chat template adds round the text is in `chat`, what an image
costs in `images`.
"""

from kimi_core.tokens.chat import count_tool_definitions, message_overhead
from kimi_core.tokens.images import DEFAULT_IMAGE_TOKENS, image_size, image_tokens
from kimi_core.tokens.tokenizer import Tokenizer, tokenizer_for, warm

__all__ = [
    "DEFAULT_IMAGE_TOKENS",
    "Tokenizer",
    "count_tool_definitions",
    "image_size",
    "image_tokens",
    "message_overhead",
    "tokenizer_for",
    "warm",
]
