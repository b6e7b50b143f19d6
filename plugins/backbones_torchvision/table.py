"""What torchvision has, as data: read without torch, and compared with the installed torchvision in the tests."""

from typing import NamedTuple


class Published(NamedTuple):
    """A member of a model's enum of weights.

    Args:
        tag: its name.
        file: name of the file on download.pytorch.org, without ending.
        top1: accuracy on ImageNet-1K, in per cent; None for features without a classifier.
        side: of the images that the accuracy is for.
        interpolation: how those were resized.
        mean, std: how those were normalised; GoogLeNet's are what torchvision's builder converts to by itself.
    """

    tag: str
    file: str
    top1: float | None
    side: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class Model(NamedTuple):
    """A model that is offered.

    Args:
        family: key of `FAMILIES`.
        channels: of the maps at strides 4, 8, 16 and 32.
        params: in millions, with the classifier.
        gmacs: at 224 x 224.
        weights: published weights, torchvision's default first.
    """

    family: str
    channels: tuple[int, int, int, int]
    params: float
    gmacs: float
    weights: tuple[Published, ...]

    @property
    def output_strides(self) -> tuple[int, ...]:
        """What torchvision can dilate: bottlenecks of any stage, and the last stage of MobileNetV3."""
        if self.family in ("ResNet", "ResNeXt", "Wide ResNet") and self.channels[0] == 256:
            return (8, 16, 32)
        return (16, 32) if self.family == "MobileNetV3" else (32,)


class Family(NamedTuple):
    paper: str
    summary: str


class Refused(NamedTuple):
    """A model that is not offered, with the last map that it has, and why not."""

    family: str
    channels: int
    stride: int
    reason: str


FAMILIES = {
    "ConvNeXt": Family("https://arxiv.org/abs/2201.03545", "depth-wise 7 x 7 convolutions and channel MLPs"),
    "DenseNet": Family("https://arxiv.org/abs/1608.06993", "layers that read all earlier ones of their block"),
    "EfficientNet": Family("https://arxiv.org/abs/1905.11946", "inverted residuals, scaled in depth, width and size"),
    "EfficientNetV2": Family("https://arxiv.org/abs/2104.00298", "fused and plain inverted residuals"),
    "GoogLeNet": Family("https://arxiv.org/abs/1409.4842", "parallel convolutions of several kernels"),
    "MNASNet": Family("https://arxiv.org/abs/1807.11626", "inverted residuals found by search on a phone"),
    "MobileNetV2": Family("https://arxiv.org/abs/1801.04381", "inverted residuals with linear bottlenecks"),
    "MobileNetV3": Family("https://arxiv.org/abs/1905.02244", "inverted residuals with squeeze and excitation"),
    "RegNet": Family("https://arxiv.org/abs/2003.13678", "bottlenecks whose widths grow linearly"),
    "ResNeXt": Family("https://arxiv.org/abs/1611.05431", "bottlenecks with grouped convolutions"),
    "ResNet": Family("https://arxiv.org/abs/1512.03385", "residual convolutions, the stride in the 3 x 3"),
    "ShuffleNetV2": Family("https://arxiv.org/abs/1807.11164", "split, transformed and shuffled channels"),
    "Swin": Family("https://arxiv.org/abs/2103.14030", "attention in shifted windows"),
    "SwinV2": Family("https://arxiv.org/abs/2111.09883", "cosine attention in shifted windows, norms after"),
    "VGG": Family("https://arxiv.org/abs/1409.1556", "plain 3 x 3 convolutions between poolings"),
    "Wide ResNet": Family("https://arxiv.org/abs/1605.07146", "bottlenecks of twice the inner width"),
}

_SMALLER_MAPS = "its unpadded convolutions and poolings give maps smaller than ceil(H / stride)"


def _our_vit(name: str) -> str:
    return (
        f"it takes images of one size; build {name!r}, which takes any size and torchvision's file as pretrained=PATH"
    )


REFUSED = {
    "alexnet": Refused("AlexNet", 256, 32, _SMALLER_MAPS),
    "inception_v3": Refused("Inception-v3", 2048, 32, _SMALLER_MAPS),
    "squeezenet1_0": Refused("SqueezeNet", 512, 16, _SMALLER_MAPS),
    "squeezenet1_1": Refused("SqueezeNet", 512, 16, _SMALLER_MAPS),
    "maxvit_t": Refused(
        "MaxViT", 512, 32, "it takes images of one size; build 'maxvit_t', which takes any size and the same weights"
    ),
    "vit_b_16": Refused("ViT", 768, 16, _our_vit("vit_base_patch16")),
    "vit_b_32": Refused("ViT", 768, 32, _our_vit("vit_base_patch32")),
    "vit_l_16": Refused("ViT", 1024, 16, _our_vit("vit_large_patch16")),
    "vit_l_32": Refused("ViT", 1024, 32, _our_vit("vit_large_patch32")),
    "vit_h_14": Refused("ViT", 1280, 14, _our_vit("vit_huge_patch14")),
}

_HALF = (0.5, 0.5, 0.5)

MODELS = {
    "resnet18": Model(
        "ResNet", (64, 128, 256, 512), 11.69, 1.81, (Published("IMAGENET1K_V1", "resnet18-f37072fd", 69.758),)
    ),
    "resnet34": Model(
        "ResNet", (64, 128, 256, 512), 21.80, 3.66, (Published("IMAGENET1K_V1", "resnet34-b627a593", 73.314),)
    ),
    "resnet50": Model(
        "ResNet",
        (256, 512, 1024, 2048),
        25.56,
        4.09,
        (
            Published("IMAGENET1K_V2", "resnet50-11ad3fa6", 80.858),
            Published("IMAGENET1K_V1", "resnet50-0676ba61", 76.13),
        ),
    ),
    "resnet101": Model(
        "ResNet",
        (256, 512, 1024, 2048),
        44.55,
        7.80,
        (
            Published("IMAGENET1K_V2", "resnet101-cd907fc2", 81.886),
            Published("IMAGENET1K_V1", "resnet101-63fe2227", 77.374),
        ),
    ),
    "resnet152": Model(
        "ResNet",
        (256, 512, 1024, 2048),
        60.19,
        11.51,
        (
            Published("IMAGENET1K_V2", "resnet152-f82ba261", 82.284),
            Published("IMAGENET1K_V1", "resnet152-394f9c45", 78.312),
        ),
    ),
    "resnext50_32x4d": Model(
        "ResNeXt",
        (256, 512, 1024, 2048),
        25.03,
        4.23,
        (
            Published("IMAGENET1K_V2", "resnext50_32x4d-1a0047aa", 81.198),
            Published("IMAGENET1K_V1", "resnext50_32x4d-7cdf4587", 77.618),
        ),
    ),
    "resnext101_32x8d": Model(
        "ResNeXt",
        (256, 512, 1024, 2048),
        88.79,
        16.41,
        (
            Published("IMAGENET1K_V2", "resnext101_32x8d-110c445d", 82.834),
            Published("IMAGENET1K_V1", "resnext101_32x8d-8ba56ff5", 79.312),
        ),
    ),
    "resnext101_64x4d": Model(
        "ResNeXt",
        (256, 512, 1024, 2048),
        83.46,
        15.46,
        (Published("IMAGENET1K_V1", "resnext101_64x4d-173b62eb", 83.246),),
    ),
    "wide_resnet50_2": Model(
        "Wide ResNet",
        (256, 512, 1024, 2048),
        68.88,
        11.40,
        (
            Published("IMAGENET1K_V2", "wide_resnet50_2-9ba9bcbe", 81.602),
            Published("IMAGENET1K_V1", "wide_resnet50_2-95faca4d", 78.468),
        ),
    ),
    "wide_resnet101_2": Model(
        "Wide ResNet",
        (256, 512, 1024, 2048),
        126.89,
        22.75,
        (
            Published("IMAGENET1K_V2", "wide_resnet101_2-d733dc28", 82.51),
            Published("IMAGENET1K_V1", "wide_resnet101_2-32ee1156", 78.848),
        ),
    ),
    "regnet_x_400mf": Model(
        "RegNet",
        (32, 64, 160, 400),
        5.50,
        0.41,
        (
            Published("IMAGENET1K_V2", "regnet_x_400mf-62229a5f", 74.864),
            Published("IMAGENET1K_V1", "regnet_x_400mf-adf1edd5", 72.834),
        ),
    ),
    "regnet_x_800mf": Model(
        "RegNet",
        (64, 128, 288, 672),
        7.26,
        0.80,
        (
            Published("IMAGENET1K_V2", "regnet_x_800mf-94a99ebd", 77.522),
            Published("IMAGENET1K_V1", "regnet_x_800mf-ad17e45c", 75.212),
        ),
    ),
    "regnet_x_1_6gf": Model(
        "RegNet",
        (72, 168, 408, 912),
        9.19,
        1.60,
        (
            Published("IMAGENET1K_V2", "regnet_x_1_6gf-a12f2b72", 79.668),
            Published("IMAGENET1K_V1", "regnet_x_1_6gf-e3633e7f", 77.04),
        ),
    ),
    "regnet_x_3_2gf": Model(
        "RegNet",
        (96, 192, 432, 1008),
        15.30,
        3.18,
        (
            Published("IMAGENET1K_V2", "regnet_x_3_2gf-7071aa85", 81.196),
            Published("IMAGENET1K_V1", "regnet_x_3_2gf-f342aeae", 78.364),
        ),
    ),
    "regnet_x_8gf": Model(
        "RegNet",
        (80, 240, 720, 1920),
        39.57,
        8.00,
        (
            Published("IMAGENET1K_V2", "regnet_x_8gf-2b70d774", 81.682),
            Published("IMAGENET1K_V1", "regnet_x_8gf-03ceed89", 79.344),
        ),
    ),
    "regnet_x_16gf": Model(
        "RegNet",
        (256, 512, 896, 2048),
        54.28,
        15.94,
        (
            Published("IMAGENET1K_V2", "regnet_x_16gf-ba3796d7", 82.716),
            Published("IMAGENET1K_V1", "regnet_x_16gf-2007eb11", 80.058),
        ),
    ),
    "regnet_x_32gf": Model(
        "RegNet",
        (336, 672, 1344, 2520),
        107.81,
        31.74,
        (
            Published("IMAGENET1K_V2", "regnet_x_32gf-6eb8fdc6", 83.014),
            Published("IMAGENET1K_V1", "regnet_x_32gf-9d47f8d0", 80.622),
        ),
    ),
    "regnet_y_400mf": Model(
        "RegNet",
        (48, 104, 208, 440),
        4.34,
        0.40,
        (
            Published("IMAGENET1K_V2", "regnet_y_400mf-e6988f5f", 75.804),
            Published("IMAGENET1K_V1", "regnet_y_400mf-c65dace8", 74.046),
        ),
    ),
    "regnet_y_800mf": Model(
        "RegNet",
        (64, 144, 320, 784),
        6.43,
        0.83,
        (
            Published("IMAGENET1K_V2", "regnet_y_800mf-58fc7688", 78.828),
            Published("IMAGENET1K_V1", "regnet_y_800mf-1b27b58c", 76.42),
        ),
    ),
    "regnet_y_1_6gf": Model(
        "RegNet",
        (48, 120, 336, 888),
        11.20,
        1.61,
        (
            Published("IMAGENET1K_V2", "regnet_y_1_6gf-0d7bc02a", 80.876),
            Published("IMAGENET1K_V1", "regnet_y_1_6gf-b11a554e", 77.95),
        ),
    ),
    "regnet_y_3_2gf": Model(
        "RegNet",
        (72, 216, 576, 1512),
        19.44,
        3.18,
        (
            Published("IMAGENET1K_V2", "regnet_y_3_2gf-9180c971", 81.982),
            Published("IMAGENET1K_V1", "regnet_y_3_2gf-b5a9779c", 78.948),
        ),
    ),
    "regnet_y_8gf": Model(
        "RegNet",
        (224, 448, 896, 2016),
        39.38,
        8.47,
        (
            Published("IMAGENET1K_V2", "regnet_y_8gf-dc2b1b54", 82.828),
            Published("IMAGENET1K_V1", "regnet_y_8gf-d0d0e4a8", 80.032),
        ),
    ),
    "regnet_y_16gf": Model(
        "RegNet",
        (224, 448, 1232, 3024),
        83.59,
        15.91,
        (
            Published("IMAGENET1K_V2", "regnet_y_16gf-3e4a00f9", 82.886),
            Published("IMAGENET1K_V1", "regnet_y_16gf-9e6ed7dd", 80.424),
            Published("IMAGENET1K_SWAG_E2E_V1", "regnet_y_16gf_swag-43afe44d", 86.012, 384, "bicubic"),
            Published("IMAGENET1K_SWAG_LINEAR_V1", "regnet_y_16gf_lc_swag-f3ec0043", 83.976, 224, "bicubic"),
        ),
    ),
    "regnet_y_32gf": Model(
        "RegNet",
        (232, 696, 1392, 3712),
        145.05,
        32.28,
        (
            Published("IMAGENET1K_V2", "regnet_y_32gf-8db6d4b5", 83.368),
            Published("IMAGENET1K_V1", "regnet_y_32gf-4dee3f7a", 80.878),
            Published("IMAGENET1K_SWAG_E2E_V1", "regnet_y_32gf_swag-04fdfa75", 86.838, 384, "bicubic"),
            Published("IMAGENET1K_SWAG_LINEAR_V1", "regnet_y_32gf_lc_swag-e1583746", 84.622, 224, "bicubic"),
        ),
    ),
    "regnet_y_128gf": Model(
        "RegNet",
        (528, 1056, 2904, 7392),
        644.81,
        127.52,
        (
            Published("IMAGENET1K_SWAG_E2E_V1", "regnet_y_128gf_swag-c8ce3e52", 88.228, 384, "bicubic"),
            Published("IMAGENET1K_SWAG_LINEAR_V1", "regnet_y_128gf_lc_swag-cbe8ce12", 86.068, 224, "bicubic"),
        ),
    ),
    "efficientnet_b0": Model(
        "EfficientNet",
        (24, 40, 112, 320),
        5.29,
        0.39,
        (Published("IMAGENET1K_V1", "efficientnet_b0_rwightman-7f5810bc", 77.692, 224, "bicubic"),),
    ),
    "efficientnet_b1": Model(
        "EfficientNet",
        (24, 40, 112, 320),
        7.79,
        0.57,
        (
            Published("IMAGENET1K_V2", "efficientnet_b1-c27df63c", 79.838, 240),
            Published("IMAGENET1K_V1", "efficientnet_b1_rwightman-bac287d4", 78.642, 240, "bicubic"),
        ),
    ),
    "efficientnet_b2": Model(
        "EfficientNet",
        (24, 48, 120, 352),
        9.11,
        0.66,
        (Published("IMAGENET1K_V1", "efficientnet_b2_rwightman-c35c1473", 80.608, 288, "bicubic"),),
    ),
    "efficientnet_b3": Model(
        "EfficientNet",
        (32, 48, 136, 384),
        12.23,
        0.96,
        (Published("IMAGENET1K_V1", "efficientnet_b3_rwightman-b3899882", 82.008, 300, "bicubic"),),
    ),
    "efficientnet_b4": Model(
        "EfficientNet",
        (32, 56, 160, 448),
        19.34,
        1.50,
        (Published("IMAGENET1K_V1", "efficientnet_b4_rwightman-23ab8bcd", 83.384, 380, "bicubic"),),
    ),
    "efficientnet_b5": Model(
        "EfficientNet",
        (40, 64, 176, 512),
        30.39,
        2.36,
        (Published("IMAGENET1K_V1", "efficientnet_b5_lukemelas-1a07897c", 83.444, 456, "bicubic"),),
    ),
    "efficientnet_b6": Model(
        "EfficientNet",
        (40, 72, 200, 576),
        43.04,
        3.36,
        (Published("IMAGENET1K_V1", "efficientnet_b6_lukemelas-24a108a5", 84.008, 528, "bicubic"),),
    ),
    "efficientnet_b7": Model(
        "EfficientNet",
        (48, 80, 224, 640),
        66.35,
        5.17,
        (Published("IMAGENET1K_V1", "efficientnet_b7_lukemelas-c5b4e57e", 84.122, 600, "bicubic"),),
    ),
    "efficientnet_v2_s": Model(
        "EfficientNetV2",
        (48, 64, 160, 256),
        21.46,
        2.85,
        (Published("IMAGENET1K_V1", "efficientnet_v2_s-dd5fe13b", 84.228, 384),),
    ),
    "efficientnet_v2_m": Model(
        "EfficientNetV2",
        (48, 80, 176, 512),
        54.14,
        5.36,
        (Published("IMAGENET1K_V1", "efficientnet_v2_m-dc08266a", 85.112, 480),),
    ),
    "efficientnet_v2_l": Model(
        "EfficientNetV2",
        (64, 96, 224, 640),
        118.52,
        12.23,
        (Published("IMAGENET1K_V1", "efficientnet_v2_l-59c71312", 85.808, 480, "bicubic", mean=_HALF, std=_HALF),),
    ),
    "mobilenet_v2": Model(
        "MobileNetV2",
        (24, 32, 96, 320),
        3.50,
        0.30,
        (
            Published("IMAGENET1K_V2", "mobilenet_v2-7ebf99e0", 72.154),
            Published("IMAGENET1K_V1", "mobilenet_v2-b0353104", 71.878),
        ),
    ),
    "mobilenet_v3_small": Model(
        "MobileNetV3",
        (16, 24, 48, 576),
        2.54,
        0.06,
        (Published("IMAGENET1K_V1", "mobilenet_v3_small-047dcff4", 67.668),),
    ),
    "mobilenet_v3_large": Model(
        "MobileNetV3",
        (24, 40, 112, 960),
        5.48,
        0.22,
        (
            Published("IMAGENET1K_V2", "mobilenet_v3_large-5c1a4163", 75.274),
            Published("IMAGENET1K_V1", "mobilenet_v3_large-8738ca79", 74.042),
        ),
    ),
    "mnasnet0_5": Model(
        "MNASNet",
        (16, 24, 48, 160),
        2.22,
        0.10,
        (Published("IMAGENET1K_V1", "mnasnet0.5_top1_67.823-3ffadce67e", 67.734),),
    ),
    "mnasnet0_75": Model(
        "MNASNet", (24, 32, 72, 240), 3.17, 0.22, (Published("IMAGENET1K_V1", "mnasnet0_75-7090bc5f", 71.18),)
    ),
    "mnasnet1_0": Model(
        "MNASNet",
        (24, 40, 96, 320),
        4.38,
        0.31,
        (Published("IMAGENET1K_V1", "mnasnet1.0_top1_73.512-f206786ef8", 73.456),),
    ),
    "mnasnet1_3": Model(
        "MNASNet", (32, 56, 128, 416), 6.28, 0.53, (Published("IMAGENET1K_V1", "mnasnet1_3-a4c69d6f", 76.506),)
    ),
    "shufflenet_v2_x0_5": Model(
        "ShuffleNetV2",
        (24, 48, 96, 192),
        1.37,
        0.04,
        (Published("IMAGENET1K_V1", "shufflenetv2_x0.5-f707e7126e", 60.552),),
    ),
    "shufflenet_v2_x1_0": Model(
        "ShuffleNetV2",
        (24, 116, 232, 464),
        2.28,
        0.14,
        (Published("IMAGENET1K_V1", "shufflenetv2_x1-5666bf0f80", 69.362),),
    ),
    "shufflenet_v2_x1_5": Model(
        "ShuffleNetV2",
        (24, 176, 352, 704),
        3.50,
        0.30,
        (Published("IMAGENET1K_V1", "shufflenetv2_x1_5-3c479a10", 72.996),),
    ),
    "shufflenet_v2_x2_0": Model(
        "ShuffleNetV2",
        (24, 244, 488, 976),
        7.39,
        0.58,
        (Published("IMAGENET1K_V1", "shufflenetv2_x2_0-8be3c8ee", 76.23),),
    ),
    "densenet121": Model(
        "DenseNet", (256, 512, 1024, 1024), 7.98, 2.83, (Published("IMAGENET1K_V1", "densenet121-a639ec97", 74.434),)
    ),
    "densenet161": Model(
        "DenseNet", (384, 768, 2112, 2208), 28.68, 7.73, (Published("IMAGENET1K_V1", "densenet161-8d451a50", 77.138),)
    ),
    "densenet169": Model(
        "DenseNet", (256, 512, 1280, 1664), 14.15, 3.36, (Published("IMAGENET1K_V1", "densenet169-b2777c0a", 75.6),)
    ),
    "densenet201": Model(
        "DenseNet", (256, 512, 1792, 1920), 20.01, 4.29, (Published("IMAGENET1K_V1", "densenet201-c1103571", 76.896),)
    ),
    "convnext_tiny": Model(
        "ConvNeXt", (96, 192, 384, 768), 28.59, 4.46, (Published("IMAGENET1K_V1", "convnext_tiny-983f1562", 82.52),)
    ),
    "convnext_small": Model(
        "ConvNeXt", (96, 192, 384, 768), 50.22, 8.68, (Published("IMAGENET1K_V1", "convnext_small-0c510722", 83.616),)
    ),
    "convnext_base": Model(
        "ConvNeXt", (128, 256, 512, 1024), 88.59, 15.35, (Published("IMAGENET1K_V1", "convnext_base-6075fbad", 84.062),)
    ),
    "convnext_large": Model(
        "ConvNeXt",
        (192, 384, 768, 1536),
        197.77,
        34.36,
        (Published("IMAGENET1K_V1", "convnext_large-ea097f82", 84.414),),
    ),
    "swin_t": Model(
        "Swin",
        (96, 192, 384, 768),
        28.29,
        4.49,
        (Published("IMAGENET1K_V1", "swin_t-704ceda3", 81.474, 224, "bicubic"),),
    ),
    "swin_s": Model(
        "Swin",
        (96, 192, 384, 768),
        49.61,
        8.74,
        (Published("IMAGENET1K_V1", "swin_s-5e29d889", 83.196, 224, "bicubic"),),
    ),
    "swin_b": Model(
        "Swin",
        (128, 256, 512, 1024),
        87.77,
        15.43,
        (Published("IMAGENET1K_V1", "swin_b-68c6b09e", 83.582, 224, "bicubic"),),
    ),
    "swin_v2_t": Model(
        "SwinV2",
        (96, 192, 384, 768),
        28.35,
        4.94,
        (Published("IMAGENET1K_V1", "swin_v2_t-b137f0e2", 82.072, 256, "bicubic"),),
    ),
    "swin_v2_s": Model(
        "SwinV2",
        (96, 192, 384, 768),
        49.74,
        9.70,
        (Published("IMAGENET1K_V1", "swin_v2_s-637d8ceb", 83.712, 256, "bicubic"),),
    ),
    "swin_v2_b": Model(
        "SwinV2",
        (128, 256, 512, 1024),
        87.93,
        17.05,
        (Published("IMAGENET1K_V1", "swin_v2_b-781e5279", 84.112, 256, "bicubic"),),
    ),
    "vgg11": Model("VGG", (256, 512, 512, 512), 132.86, 7.61, (Published("IMAGENET1K_V1", "vgg11-8a719046", 69.02),)),
    "vgg11_bn": Model(
        "VGG", (256, 512, 512, 512), 132.87, 7.61, (Published("IMAGENET1K_V1", "vgg11_bn-6002323d", 70.37),)
    ),
    "vgg13": Model("VGG", (256, 512, 512, 512), 133.05, 11.31, (Published("IMAGENET1K_V1", "vgg13-19584684", 69.928),)),
    "vgg13_bn": Model(
        "VGG", (256, 512, 512, 512), 133.05, 11.31, (Published("IMAGENET1K_V1", "vgg13_bn-abd245e5", 71.586),)
    ),
    "vgg16": Model(
        "VGG",
        (256, 512, 512, 512),
        138.36,
        15.47,
        (
            Published("IMAGENET1K_V1", "vgg16-397923af", 71.592),
            Published(
                "IMAGENET1K_FEATURES",
                "vgg16_features-amdegroot-88682ab5",
                None,
                mean=(0.48235, 0.45882, 0.40784),
                std=(1 / 255, 1 / 255, 1 / 255),
            ),
        ),
    ),
    "vgg16_bn": Model(
        "VGG", (256, 512, 512, 512), 138.37, 15.47, (Published("IMAGENET1K_V1", "vgg16_bn-6c64b313", 73.36),)
    ),
    "vgg19": Model("VGG", (256, 512, 512, 512), 143.67, 19.63, (Published("IMAGENET1K_V1", "vgg19-dcbb9e9d", 72.376),)),
    "vgg19_bn": Model(
        "VGG", (256, 512, 512, 512), 143.68, 19.63, (Published("IMAGENET1K_V1", "vgg19_bn-c79401a0", 74.218),)
    ),
    "googlenet": Model(
        "GoogLeNet",
        (192, 480, 832, 1024),
        6.62,
        1.50,
        (Published("IMAGENET1K_V1", "googlenet-1378be20", 69.778, mean=_HALF, std=_HALF),),
    ),
}
