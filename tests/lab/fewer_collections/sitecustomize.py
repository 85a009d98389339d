"""For the processes that the tests start, whose time mostly goes into importing the libraries.

While importing, Python's garbage collector looks at more and more objects, and finds no garbage.
"""

import gc

gc.set_threshold(100_000)
