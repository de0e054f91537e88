"""A reward that sees texture: `--reward clipscore,experiments/smooth.py:smooth:20`.

It falls with fine noise, such as quantization may leave in a picture.
"""

import torch.nn.functional as F


def smooth(images, prompts, metadata):
    """Minus the mean distance of a picture (n, 3, H, W) from the means of its 3x3 neighbourhoods:
    0 for a picture of one colour, lower the more edges and noise it has; (n,)."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return -(images - blurred).abs().mean(dim=(1, 2, 3))
