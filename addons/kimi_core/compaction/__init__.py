"""Old exchanges of a conversation replaced by a summary of them.

`cuts` says where a conversation may be cut, `planning` whether it is worth it, `asking` gets a
summary from a model and `extract` makes one without, `rewrite` puts it into a request, and
`summaries` knows which requests it belongs to.
"""
