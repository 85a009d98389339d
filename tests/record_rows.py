"""Run a stage's script and write which rows it trains on: python record_rows.py SCRIPT FLAGS...

Each process writes the indices of the rows its loader fetches, in order, to $RECORD_ROWS.RANK.
"""

import os
import runpy
import sys

from datasets import Dataset

getitems = Dataset.__getitems__


def recording(self, keys):
    with open(f"{os.environ['RECORD_ROWS']}.{os.environ.get('RANK', 0)}", "a") as file:
        file.writelines(f"{key}\n" for key in keys)
    return getitems(self, keys)


Dataset.__getitems__ = recording
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
