"""A plugin with a hook that is neither marked nor named right."""

BACKBONES_API = 1


def register_backbone():
    return []
