"""English texts that every Python has: the pages of its own documentation."""

from pydoc_data.topics import topics

PAGES = [topics[key] for key in sorted(topics)]
CALIBRATION, VALIDATION = PAGES[1::2], PAGES[0::2]
