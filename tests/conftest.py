"""One thread for every test, and `import helpers` from any folder of tests."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parent))
