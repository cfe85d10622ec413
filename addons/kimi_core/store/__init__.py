"""What kimi-proxy keeps, in one SQLite file.

Rows are queued from any thread and committed by one; questions are answered from any thread on
connections of their own. `schema` has the tables, `retention` says what goes.
"""

from kimi_core.store.read import StoreReader
from kimi_core.store.schema import (
    ATTEMPT_COLUMNS,
    EXCHANGE_COLUMNS,
    SESSION_COLUMNS,
    StoreError,
)
from kimi_core.store.store import Store, release, shared

__all__ = [
    "ATTEMPT_COLUMNS",
    "EXCHANGE_COLUMNS",
    "SESSION_COLUMNS",
    "Store",
    "StoreError",
    "StoreReader",
    "release",
    "shared",
]
