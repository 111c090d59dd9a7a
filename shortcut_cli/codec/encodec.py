"""EnCodec 24 kHz (Defossez et al. 2022, arXiv 2210.13438) as a stream: samples <-> codes at constant memory.

The model is causal: a convolution needs the rows before its window, the LSTM its state, and nothing else of the past.
Both are carried from block to block, so the codes are those of the whole file. The structure and the quantizer are the
package's own; its convolutions are computed here as one matrix product over windows of rows, time first, (T, C), which
is 1.3 times as fast on one core as the package's layers and needs no transposing around the LSTM.

Blocks are cut to BLOCK_FRAMES inside, whatever size they come in: the codes of a file can't depend on that size, not
even by a rounding error.
"""

import hashlib
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shortcut_cli.codec.weights import resolve
from shortcut_cli.errors import CheckFailed

# `import encodec` imports torchaudio, whose Linux wheel does not load beside a CPU-only torch; nothing of it is needed
# to encode or decode. An empty module takes its place while the import lasts, unless the real one is there already.
_PLACEHOLDER = "torchaudio" not in sys.modules
if _PLACEHOLDER:
    sys.modules["torchaudio"] = ModuleType("torchaudio")
try:
    from encodec import EncodecModel
    from encodec.modules import SLSTM, SConv1d, SConvTranspose1d
    from encodec.modules.conv import pad1d
    from encodec.modules.seanet import SEANetResnetBlock
finally:
    if _PLACEHOLDER:
        del sys.modules["torchaudio"]
