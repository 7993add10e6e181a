"""What the scripts at the root share. Nothing here imports a script.

    cli, options, files    what every script needs
    grounding/             text alone: sentences, citations, numbers
    data/                  a file -> checked rows -> tokens -> batches
    model/                 what runs, and on what
    training/              around the training loop; the loop itself is stage_a_sft_training.py
    inference/             decoding, files of notes, the conversation, the server

Imports run one way: training -> evaluation -> inference -> model, data, grounding; data -> grounding; cli,
options and files import no folder. tests/test_layout.py asserts it.

Importing this package sets what the libraries read from the environment, before any of them is imported."""

import logging
import os
import sys

__version__ = "0.2.0"

# huggingface_hub reads this once, when it is imported, and sends telemetry unless it is set. A program that
# imported it before us has read it already: there the constant itself is set.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
if "huggingface_hub.constants" in sys.modules:
    sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True

# The tokenizers library warns and gives up its threads in forked processes unless this is set either way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

# oneDNN caches one compiled matrix product per number of rows, 1,024 by default: 0.4 GB of a training run for
# no gain.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

# A thread of libgomp's that is done turns 300,000 times, waiting for the others, before it gives up its core.
# 10,000 are as fast on a quiet machine, and 1.6 to 3 times as fast beside one busy program
# (docs/measured.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# bitsandbytes logs a warning on import where there is no GPU, and PEFT imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
