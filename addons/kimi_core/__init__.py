"""What kimi-proxy knows about LLM traffic; only `flows` knows mitmproxy."""
