"""The runtimes that packages are made for, each in a file of its own."""

from collections.abc import Mapping

from lora_export.packages.job import Target
from lora_export.packages.targets.genai import GenaiTarget
from lora_export.packages.targets.hf import HubTarget
from lora_export.packages.targets.optimum import OptimumTarget
from lora_export.packages.targets.transformers_js import TransformersJsTarget
from lora_export.packages.targets.triton import TritonTarget

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (GenaiTarget(), OptimumTarget(), TritonTarget(), TransformersJsTarget(), HubTarget())
}
