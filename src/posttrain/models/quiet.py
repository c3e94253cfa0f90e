"""Loading without the library's chatter: what matters is said by us, in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Transformers' progress bars and everything below an error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Transformers about its own names, called by PEFT
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
