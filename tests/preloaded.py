"""What the server of tests/warm.py has in memory beside the libraries.

The small recipes of the tests (tests/conftest.py, tests/faults/jobs.py) learn their tokenizer from
the captions of the same scenes, which takes longer than what most of them do afterwards.
"""

from daybreak.data import batches, scenes

batches.said(scenes.Config(canvas="32"), 3)
