"""The checker of types and shapes while tests run: beartype, for which an int is a float too.

beartype looks at one random item of a container and draws it from Python's global generator, which the tests of exact
resume compare: here it draws from a generator of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import beartype._check.code.codemain as beartype_code
from beartype import BeartypeConf, beartype

assert beartype_code.getrandbits == random.getrandbits, "beartype has changed: see the module's docstring"
beartype_code.getrandbits = random.Random(0).getrandbits

check: Callable = beartype(conf=BeartypeConf(is_pep484_tower=True))
