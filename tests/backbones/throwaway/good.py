"""A plugin as it should be, but for a stray print; it lists one backbone and finds others."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1

print("a stray line from a plugin")


def _spec(name, channels, **more):
    return BackboneSpec(
        name=name,
        family="Good",
        entry="throwaway_good_model:GoodNet",
        channels=channels,
        strides=(4, 8),
        defaults={"widths": list(channels)},
        **more,
    )


@hookimpl
def register_backbones():
    yield _spec("good_net", (8, 16), aliases=("good_net_224",))


@hookimpl
def catalogue():
    return ["good_net", "good_net_wide_16", "good_net_wide_32"]


@hookimpl
def find_backbone(name):
    prefix, _, width = name.rpartition("_")
    return _spec(name, (int(width), 2 * int(width))) if prefix == "good_net_wide" else None


def command(arguments):
    print(f"good command: {arguments}")
    return len(arguments) + 1
