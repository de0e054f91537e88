"""A reward that prefers pictures which equal their mirror image."""


def symmetry(images, prompts, metadata):
    return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))
