"""The headers in which clients and providers carry what nobody else may see."""

SECRET_HEADERS = frozenset(
    (
        b"authorization",
        b"proxy-authorization",
        b"x-api-key",
        b"x-goog-api-key",
        b"api-key",
        b"x-api-token",
        b"x-auth-token",
        b"x-litellm-api-key",
        b"helicone-auth",
        b"cf-aig-authorization",
        b"cookie",
    )
)
