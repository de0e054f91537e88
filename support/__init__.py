"""Everything behind the method. This file runs before every other one of the package and silences
what other packages print to no use of the user; it must not import torch."""

import logging
import os
import warnings

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
