"""The subcommands of kimi-proxy that need no mitmproxy; `cli.py` of the addons has the rest."""
