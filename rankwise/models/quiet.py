"""Silence around transformers and the Hub's client: their notices are not ours to show. Errors are raised as before."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside the block transformers prints no notices and no progress bars, and the Hub's client no notices (a download
    keeps its bar), and bitsandbytes none about kernels that one could download; their settings return afterwards.
    """
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bits_logger = logging.getLogger("bitsandbytes")
    bits_level = bits_logger.level
    bits_logger.setLevel(logging.ERROR)
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        bits_logger.setLevel(bits_level)
        if had_bars:
            transformers_logging.enable_progress_bar()
