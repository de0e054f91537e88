"""Everything behind the method. This file runs before every other one of the package, prepares
OpenMP and hides warnings that users do not need. It must not import torch."""

import logging
import os
import warnings

import psutil

# OpenMP's threads wait for each other many times in a sampling step, and spin meanwhile. On idle
# cores that is fastest. Beside busy processes it takes the core from the thread that is waited for:
# a run then takes twice as long as with threads that soon sleep. GNU OpenMP reads this limit once.
if psutil.cpu_percent(0.2) / 100 * psutil.cpu_count() > 0.5:  # more than half a core is in use
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # importing FLUX.1 would warn twice
for name in (
    "torchao",  # peft and diffusers import it where it is installed, and it warns of what it lacks:
    "torch.utils._pytree",  # about torchao's use of it
    "diffusers.quantizers.torchao",  # about an older torchao
    "diffusers.pipelines.flux",  # about prompts that are too long: models.cut_off counts them
    "diffusers.pipelines.stable_diffusion_3",
):
    logging.getLogger(name).setLevel(logging.ERROR)
# peft warns of a second adapter, as if it had been added by mistake.
warnings.filterwarnings("ignore", message="Already found a `peft_config`")
