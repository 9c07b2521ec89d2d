"""The split, under the name by which scripts beside it import it: ``from dataset import load_split``.

Here are the split as it is in memory, the function that loads and checks one, and the batches of training samples that
are drawn from it. The code is in neural_cf/split.py and neural_cf/data/batches.py.
"""

from neural_cf.data.batches import TrainingBatches
from neural_cf.split import Split, load_split

__all__ = ["Split", "TrainingBatches", "load_split"]
