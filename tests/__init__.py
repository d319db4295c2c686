"""The tests, in the same folders as the code."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # before the Hub's client is imported: no test may wait for a server
