"""The whole chain, in order: `mitmdump -s addons/all.py`."""

from compressor import Compressor
from counter import Counter
from enforcer import Enforcer
from guard import Guard
from hook_cache import HookCache
from normalizer import Normalizer
from recorder import Recorder
from router import Dispatch, Router
from sanitizer import Sanitizer
from stats import Stats
from views import Views

addons = [
    HookCache(),
    Guard(),
    Router(),
    Compressor(),
    Sanitizer(),
    Enforcer(),
    Normalizer(),
    Counter(),
    Recorder(),
    Stats(),
    Views(),
    Dispatch(),
]
